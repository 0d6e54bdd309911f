"""Runs the real `internvl-runtime` as processes on loopback."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx

FLAGS = {
    "maxBatchSize": 16, "maxSequenceTokens": 32768, "maxInputTokens": 32767,
    "maxBatchedTokens": 8192, "maxTilesPerImage": 12, "maxTilesPerRequest": 52,
}  # fmt: skip
ARCHITECTURES = {"PyTorch": "cpu-x86_64", "TensorRT": "sm_90"}
VERSIONS = {
    "PyTorch": {"torch": "2.11.0"},
    "TensorRT": {"tensorrt": "10.14.1.48", "tensorrt_llm": "1.2.1"},
}
_READY_SECONDS = 120


@dataclass(frozen=True)
class Server:
    """A running server."""

    url: str
    metrics_url: str
    process: subprocess.Popen


def run(*arguments, cache, termination_log=None, **more):
    """Run one command, with more variables of the environment; returns the finished process."""
    environment = {
        **os.environ,
        **more,
        "INTERNVL_RUNTIME_CACHE_ROOT": str(cache),
        "INTERNVL_RUNTIME_TERMINATION_LOG": str(termination_log or "/nonexistent"),
    }
    return subprocess.run(
        [sys.executable, "-m", "internvl_runtime", *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def result_of(*arguments, cache):
    """Run one command that must succeed; returns its result object."""
    done = run(*arguments, cache=cache)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def synthesize(folder: Path, shape: str, family: str, seed: int = 5) -> Path:
    """Make a checkpoint of random weights; returns its folder."""
    done = run(
        "synthesize", "--shape", shape, "--family", family, "--seed", seed, "--output", folder,
        cache="/nonexistent",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return Path(folder)


def build_engine(folder: Path, *, cache: Path, **how) -> Path:
    """Walk from a checkpoint's folder to a published engine; returns its folder."""
    return build_engine_of({"folder": {"path": str(folder)}}, cache=cache, **how)


def build_engine_of(
    described: dict,
    *,
    cache: Path,
    dtype: str = "float32",
    ranks: int = 1,
    backend: str = "PyTorch",
    flags: dict | None = None,
    for_gpu: bool = False,
) -> Path:
    """Walk from a source to a published engine, for this machine's GPU if wanted; its folder."""
    source = json.dumps(described)
    weights = result_of("resolve", "--source", source, cache=cache)["weights"]
    result_of("fetch", "--source", source, "--weights", weights, cache=cache)
    convert = ["convert", "--weights", weights, "--dtype", dtype, "--tensor-parallel-size", ranks]
    checkpoint = result_of(*convert, cache=cache)["checkpoint"]
    target = [
        "--architecture", ARCHITECTURES[backend], "--versions", json.dumps(VERSIONS[backend]),
    ]  # fmt: skip
    build = [
        "build", "--checkpoint", checkpoint, "--backend", backend,
        "--flags", json.dumps(flags or FLAGS), *([] if for_gpu else target),
    ]  # fmt: skip
    return cache / "engines" / result_of(*build, cache=cache)["engine"]


@contextlib.contextmanager
def serve(
    engine: Path, *, wait: bool = True, arguments: tuple = (), **settings: object
) -> Iterator[Server]:
    """Serve an engine on loopback until the block ends; settings by their names."""
    port, metrics_port = free_port(), free_port()
    environment = {
        **os.environ,
        "INTERNVL_RUNTIME_PROPAGATION_SECONDS": "0",
        "INTERNVL_RUNTIME_HOST": "127.0.0.1",
        "INTERNVL_RUNTIME_PORT": str(port),
        "INTERNVL_RUNTIME_METRICS_PORT": str(metrics_port),
        "INTERNVL_RUNTIME_SERVED_MODEL_NAMES": '["tiny"]',
        **{f"INTERNVL_RUNTIME_{name.upper()}": _setting(value) for name, value in settings.items()},
    }
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "internvl_runtime",
            "serve",
            "--engine",
            str(engine),
            *map(str, arguments),
        ],
        env=environment,
    )
    server = Server(f"http://127.0.0.1:{port}", f"http://127.0.0.1:{metrics_port}", process)
    try:
        if wait:
            _wait_until_ready(server)
        yield server
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        process.wait(timeout=30)


def _setting(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _wait_until_ready(server: Server) -> None:
    deadline = time.monotonic() + _READY_SECONDS
    while time.monotonic() < deadline:
        assert server.process.poll() is None, "the server has ended"
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{server.url}/readyz").status_code == 200:
                return
        time.sleep(0.1)
    raise AssertionError("the server did not become ready")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
