"""Holds the TensorRT path against the real TensorRT-LLM, where its image and a GPU are.

    make verify-tensorrt [TENSORRT_SOURCE='{"huggingFace": {…}}'] [REPORT=build/verify-tensorrt]

Without a GPU it checks imports, versions, names, flags and a dry run. With one it
builds SOURCE for both backends, serves either, and compares their answers. The
report is a table here, and `report.md` and `report.json` in the folder REPORT.
"""

import argparse
import base64
import contextlib
import dataclasses
import importlib
import importlib.metadata
import inspect
import io
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import PIL.Image
import rich.console
import rich.table
from internvl_runtime.artifacts import language_engine
from internvl_runtime.engine import device, folder

ROOT = Path(__file__).parents[1]
SURFACE = ROOT / "tests" / "contract" / "tensorrt_llm_surface.json"
FLAGS = {
    "maxBatchSize": 4, "maxSequenceTokens": 8192, "maxInputTokens": 8191,
    "maxBatchedTokens": 4096, "maxTilesPerImage": 6, "maxTilesPerRequest": 14,
}  # fmt: skip
TENSORRT_NAMES = (
    "Logger.WARNING", "Builder.create_network", "Builder.create_builder_config",
    "Builder.create_optimization_profile", "Builder.build_serialized_network",
    "NetworkDefinitionCreationFlag.STRONGLY_TYPED", "OnnxParser.parse", "OnnxParser.get_error",
    "IBuilderConfig.add_optimization_profile", "IBuilderConfig.create_timing_cache",
    "IBuilderConfig.set_timing_cache", "IBuilderConfig.get_timing_cache",
    "IBuilderConfig.progress_monitor", "IOptimizationProfile.set_shape", "IProgressMonitor",
    "Runtime.deserialize_cuda_engine", "ICudaEngine.get_tensor_profile_shape",
    "ICudaEngine.create_execution_context", "IExecutionContext.set_input_shape",
    "IExecutionContext.infer_shapes", "IExecutionContext.set_tensor_address",
    "IExecutionContext.execute_async_v3", "TensorIOMode.INPUT",
)  # fmt: skip
QUESTIONS = (
    "What is in the picture?",
    "Count from one to twenty.",
    "Which one is darker, and why?",
)
TIES = {"bfloat16": 0.25, "float16": 0.05, "float32": 1e-3}
"""Differences of the two best log-probabilities below which either token may be chosen."""
TOKENS = 48
LEAST_TOKENS = 8
"""Before a tie, in all answers together."""
START_SECONDS = 900
STOP_SECONDS = 60
BUILD_SECONDS = 4 * 3600


@dataclasses.dataclass(frozen=True)
class Found:
    """The outcome of one check."""

    name: str
    is_right: bool
    detail: str
    seconds: float


def main() -> int:
    """Run every check that can run here; exit with 1 where one fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", required=True, help="JSON, as for `internvl-runtime resolve`")
    parser.add_argument("--report", type=Path, required=True)
    parser.add_argument("--dtype", choices=TIES, default="bfloat16")
    arguments = parser.parse_args()
    checks: list[tuple[str, Callable[[], str]]] = [
        ("versions", check_versions),
        ("names of TensorRT", check_tensorrt),
        ("names of TensorRT-LLM's executor", check_executor),
        ("flags of trtllm-build", check_flags),
        ("dry run of trtllm-build", dry_run),
    ]
    if device.read_gpu():
        checks.append(("build, serve, compare", lambda: compare(arguments.source, arguments.dtype)))
    found = [_run(name, check) for name, check in checks]
    _write(found, arguments.report)
    return 0 if all(each.is_right for each in found) else 1


def _run(name: str, check: Callable[[], str]) -> Found:
    print(f"… {name}", file=sys.stderr)
    began = time.monotonic()
    try:
        detail, is_right = check(), True
    except Exception as e:  # Whatever is wrong belongs into the report.
        detail, is_right = f"{type(e).__name__}: {e}", False
    return Found(name, is_right, detail, round(time.monotonic() - began, 1))


def check_versions() -> str:
    """Compare what is installed with the pins of the runtime."""
    project = tomllib.loads((ROOT / "runtime" / "pyproject.toml").read_text())
    pins = dict(
        pin.split("==")
        for pin in project["project"]["optional-dependencies"]["tensorrt"]
        if "==" in pin
    )
    here = {name: importlib.metadata.version(name) for name in pins}
    if here != pins:
        raise ValueError(f"installed are {here}, pinned {pins}")
    return ", ".join(f"{name} {version}" for name, version in here.items())


def check_tensorrt() -> str:
    """Look for every name of TensorRT that the runtime uses."""
    module = importlib.import_module("tensorrt")
    _need_names(module, TENSORRT_NAMES)
    return f"{len(TENSORRT_NAMES)} names"


def check_executor() -> str:
    """Look for every name and keyword of the executor's binding that the runtime uses."""
    module = importlib.import_module("tensorrt_llm.bindings.executor")
    surface = json.loads(SURFACE.read_text())
    _need_names(module, surface["names"])
    missing = [
        f"{owner}({keyword}=…)"
        for owner, keywords in surface["keywords"].items()
        for keyword in keywords
        if not re.search(rf"\b{keyword}\b", _documented(getattr(module, owner)))
    ]
    if missing:
        raise ValueError(f"not accepted: {', '.join(missing)}")
    return f"{len(surface['names'])} names, {sum(map(len, surface['keywords'].values()))} keywords"


def _need_names(module: Any, names: Sequence[str]) -> None:
    missing = []
    for name in names:
        owner, _, member = name.rpartition(".")
        found = getattr(module, owner, None) if owner else module
        if not hasattr(found, member):
            missing.append(name)
    if missing:
        raise ValueError(f"{module.__name__} lacks {', '.join(missing)}")


def _documented(owner: type) -> str:
    return f"{owner.__doc__} {inspect.getattr_static(owner, '__init__').__doc__}"


def check_flags() -> str:
    """Look for every flag of ours in the command's own help."""
    wanted = {word for word in _command(Path("c"), Path("o")) if word.startswith("--")}
    offered = _shell(language_engine.PROGRAM, "--help")
    missing = sorted(flag for flag in wanted if flag not in offered)
    if missing:
        raise ValueError(f"trtllm-build has no {', '.join(missing)}")
    return f"{len(wanted)} flags"


def dry_run() -> str:
    """Let the command walk through a tiny checkpoint without building."""
    with _work() as work:
        source = json.dumps({"synthetic": {"shape": "tiny", "family": "qwen2"}})
        checkpoint = work.checkpoint(source, "bfloat16")
        folder_ = work.cache / "checkpoints" / checkpoint
        _shell(*_command(folder_, work.cache / "dry"), "--dry_run")
    return "a tiny checkpoint is read"


def _command(checkpoint: Path, output: Path) -> list[str]:
    limits = folder.limits_of(FLAGS)
    return language_engine.command(
        checkpoint, output, limits, dtype="bfloat16", workers=1, timing_cache=output.parent / "t"
    )


def compare(source: str, dtype: str) -> str:
    """Build and serve a model by both backends; every token must be the same but for ties."""
    with _work() as work:
        checkpoint = work.checkpoint(source, dtype)
        by_tensorrt = work.build(checkpoint, "TensorRT", device.architecture())
        by_pytorch = work.build(checkpoint, "PyTorch", device.cpu_architecture())
        with work.serve(by_pytorch) as url:
            expected = [_ask(url, messages, top=2) for messages in _conversations()]
        with work.serve(by_tensorrt) as url:
            given = [_ask(url, messages, top=0) for messages in _conversations()]
    compared = sum(
        _equal_tokens(*answers, tie=TIES[dtype]) for answers in zip(given, expected, strict=True)
    )
    if compared < LEAST_TOKENS:
        raise ValueError(f"{compared} tokens before a tie are too few to tell: ask for others")
    return f"{compared} tokens of {len(given)} answers are equal before a tie"


def _equal_tokens(given: dict[str, Any], expected: dict[str, Any], *, tie: float) -> int:
    """Return how many tokens are equal before a tie; raises ValueError at another one."""
    told = expected["logprobs"]["content"]
    for number, (a, b) in enumerate(
        itertools.zip_longest(given["token_ids"], expected["token_ids"])
    ):
        if number == len(told):
            raise ValueError(f"{len(given['token_ids'])} tokens, the PyTorch engine has {number}")
        best, second = (each["logprob"] for each in told[number]["top_logprobs"])
        if best - second < tie:
            return number
        if a != b:
            raise ValueError(f"token {number} is {a}, the PyTorch engine's is {b}")
    return len(expected["token_ids"])


def _conversations() -> Iterator[list[dict[str, Any]]]:
    """Yield a text, a picture, and two turns with a picture each."""
    first, count, darker = QUESTIONS
    yield [{"role": "user", "content": count}]
    yield [{"role": "user", "content": [_picture(0), {"type": "text", "text": first}]}]
    yield [
        {"role": "user", "content": [_picture(1), {"type": "text", "text": first}]},
        {"role": "assistant", "content": "Stripes."},
        {"role": "user", "content": [_picture(2), {"type": "text", "text": darker}]},
    ]


def _picture(number: int) -> dict[str, Any]:
    drawn = PIL.Image.linear_gradient("L").resize((900, 450)).rotate(45 * number).convert("RGB")
    content = io.BytesIO()
    drawn.save(content, format="PNG")
    url = "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": url}}


def _ask(url: str, messages: list[dict[str, Any]], *, top: int) -> dict[str, Any]:
    body = {
        "messages": messages, "model": "verified", "temperature": 0, "max_tokens": TOKENS,
        "return_token_ids": True, **({"logprobs": True, "top_logprobs": top} if top else {}),
    }  # fmt: skip
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=600)
    answer.raise_for_status()
    choice: dict[str, Any] = answer.json()["choices"][0]
    return choice


@dataclasses.dataclass(frozen=True)
class Work:
    """A cache folder, and the commands on it."""

    cache: Path

    def checkpoint(self, source: str, dtype: str) -> str:
        """Fetch and convert; return the checkpoint's key."""
        weights = self._result("resolve", "--source", source)["weights"]
        self._result("fetch", "--source", source, "--weights", weights)
        converted = self._result("convert", "--weights", weights, "--dtype", dtype)
        return str(converted["checkpoint"])

    def build(self, checkpoint: str, backend: str, architecture: str) -> Path:
        """Return the folder of a published engine."""
        built = self._result(
            "build", "--checkpoint", checkpoint, "--backend", backend,
            "--architecture", architecture, "--flags", json.dumps(FLAGS),
        )  # fmt: skip
        return self.cache / "engines" / str(built["engine"])

    @contextlib.contextmanager
    def serve(self, engine: Path) -> Iterator[str]:
        """Serve an engine on loopback; give its address once it is ready."""
        port = _free_port()
        settings = {"HOST": "127.0.0.1", "PORT": str(port), "METRICS_PORT": "0",
                    "SERVED_MODEL_NAMES": '["verified"]', "PROPAGATION_SECONDS": "0"}  # fmt: skip
        process = subprocess.Popen(
            [sys.executable, "-m", "internvl_runtime", "serve", "--engine", str(engine)],
            env=self._environment(**settings),
        )
        try:
            _wait_until_ready(f"http://127.0.0.1:{port}", process)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=STOP_SECONDS)

    def _result(self, *arguments: str) -> dict[str, Any]:
        told = _shell(
            sys.executable, "-m", "internvl_runtime", *arguments, environment=self._environment()
        )
        result: dict[str, Any] = json.loads(told.splitlines()[-1])
        return result

    def _environment(self, **settings: str) -> dict[str, str]:
        own = {"CACHE_ROOT": str(self.cache), "TERMINATION_LOG": os.devnull, **settings}
        return {**os.environ, **{f"INTERNVL_RUNTIME_{name}": each for name, each in own.items()}}


@contextlib.contextmanager
def _work() -> Iterator[Work]:
    with tempfile.TemporaryDirectory(prefix="verify-tensorrt-") as name:
        yield Work(Path(name))


def _shell(*command: str, environment: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        command,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=BUILD_SECONDS,
    )
    if done.returncode:
        raise ValueError(f"{' '.join(command[:4])} … ended with {done.returncode}: "
                         f"{(done.stdout + done.stderr)[-1500:]}")  # fmt: skip
    return done.stdout


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def _wait_until_ready(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise ValueError(f"the server ended with {process.returncode}; its log is above")
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{url}/readyz", timeout=10).is_success:
                return
        time.sleep(0.5)
    raise TimeoutError(f"the server is not ready after {START_SECONDS} s")


def _write(found: list[Found], report: Path) -> None:
    report.mkdir(parents=True, exist_ok=True)
    gpu = device.describe_machine()
    lines = [f"# The TensorRT path on {gpu.get('product', 'a machine without GPU')}", ""]
    lines += ["| check | outcome | seconds | detail |", "|---|---|---|---|"]
    table = rich.table.Table("check", "outcome", "seconds", "detail")
    for each in found:
        outcome = "right" if each.is_right else "WRONG"
        row = [each.name, outcome, str(each.seconds), each.detail]
        lines.append("| " + " | ".join(cell.replace("\n", " ") for cell in row) + " |")
        table.add_row(*row)
    (report / "report.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    described = {"machine": gpu, "checks": [dataclasses.asdict(each) for each in found]}
    (report / "report.json").write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
    rich.console.Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
