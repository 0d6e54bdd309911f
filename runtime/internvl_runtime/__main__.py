"""The command `internvl-runtime`."""

import argparse
import asyncio
import contextlib
import dataclasses
import json
import logging
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pydantic
import pydantic_settings

from internvl_runtime import errors, settings
from internvl_runtime.artifacts import progress, sources, stages, synthesize
from internvl_runtime.model import config
from internvl_runtime.store import cache as caches

logger = logging.getLogger(__name__)

RESULT_SCHEMA = 1
_MOST_TERMINATION_BYTES = 4096
"""Kubernetes cuts off the rest of a termination message."""
EXIT_UNFORESEEN = 1
"""Another try may go better."""
EXIT_FAILED = 80
"""Tells the operator that another try would fail alike."""
EXIT_ENGINE_INCOMPATIBLE = 81
"""Tells the operator at the first exit that starting again will not help."""
_EXITS = {
    errors.Reason.ENGINE_INCOMPATIBLE: EXIT_ENGINE_INCOMPATIBLE,
    errors.Reason.RANK_FAILED: EXIT_UNFORESEEN,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns 0, 1 when the machine failed it, 80 for a foreseen failure, 81 for
    an unfit engine.
    """
    parsed = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    try:
        config_ = _read_settings()
    except errors.StageError as e:
        return _end_with(e, parsed.command, settings.termination_log(os.environ))
    for name, meant in settings.misspelt(os.environ).items():
        logger.warning("%s is no setting; did you mean %s?", name, meant)
    # What a stage has in temporary folders goes at its end; a server ends by itself.
    if parsed.command != "serve":
        signal.signal(signal.SIGTERM, _leave)
    try:
        with _deadline(getattr(parsed, "timeout", None)):
            result = parsed.run(parsed, config_)
    except (errors.RequestError, errors.MeasurementError) as e:
        print(f"{parsed.command}: {e}", file=sys.stderr)
        return EXIT_FAILED
    except errors.StageError as e:
        return _end_with(e, parsed.command, config_.termination_log)
    except OSError as e:
        print(f"{parsed.command}: {e}", file=sys.stderr)
        return EXIT_UNFORESEEN
    if result is not None:
        _write_termination(config_.termination_log, {"stage": parsed.command, "result": result})
        print(json.dumps(result), flush=True)
    return 0


@contextlib.contextmanager
def _deadline(seconds: int | None) -> Iterator[None]:
    """End the work inside with StageError (BuildTimeout) when its time is over."""
    if seconds is None:
        yield
        return

    def end(number: int, frame: object) -> None:
        del number, frame
        raise errors.StageError(
            errors.Reason.BUILD_TIMEOUT,
            f"the stage was not done within {seconds} s",
            remedy="raise spec.engine.build.timeout; what was finished is kept for the next try",
        )

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _resolve(arguments: argparse.Namespace, config_: settings.Settings) -> dict[str, Any]:
    resolved = stages.resolve(
        sources.parse_source(arguments.source, config_),
        cache=_cache(arguments, config_),
        stage=progress.Progress("resolve"),
    )
    return dataclasses.asdict(resolved)


def _fetch(arguments: argparse.Namespace, config_: settings.Settings) -> dict[str, Any]:
    published = stages.fetch(
        sources.parse_source(arguments.source, config_),
        weights=arguments.weights,
        cache=_cache(arguments, config_),
        stage=progress.Progress("fetch"),
    )
    return {"weights": published.path.name}


def _convert(arguments: argparse.Namespace, config_: settings.Settings) -> dict[str, Any]:
    from internvl_runtime.artifacts import convert

    published = convert.convert(
        weights=arguments.weights,
        dtype=arguments.dtype,
        quantization=arguments.quantization,
        tensor_parallel_size=arguments.tensor_parallel_size,
        cache=_cache(arguments, config_),
        stage=progress.Progress("convert"),
    )
    return {"checkpoint": published.path.name}


def _build(arguments: argparse.Namespace, config_: settings.Settings) -> dict[str, Any]:
    from internvl_runtime.artifacts import build
    from internvl_runtime.engine import device, folder

    architecture = arguments.architecture or device.architecture()
    spec = build.EngineSpec(
        checkpoint=arguments.checkpoint,
        backend=arguments.backend,
        architecture=architecture,
        versions=arguments.versions or device.versions(arguments.backend, architecture),
        limits=folder.limits_of(arguments.flags),
    )
    published = build.build(
        spec, cache=_cache(arguments, config_), stage=progress.Progress("build")
    )
    return {"engine": published.path.name}


def _verify(arguments: argparse.Namespace, config_: settings.Settings) -> dict[str, Any]:
    from internvl_runtime.artifacts import answering
    from internvl_runtime.engine import folder, verification

    del config_
    opened = folder.open_engine(arguments.engine)
    inputs = caches.read_manifest(opened.path).inputs
    made = answering.answer(opened.path, inputs, caches.Cache(opened.path.parent.parent))
    verification.check(made.answers, opened.read_verification(), dtype=opened.dtype)
    return {"engine": opened.key, "verified": True}


def _manage_cache(arguments: argparse.Namespace, config_: settings.Settings) -> None:
    from internvl_runtime.artifacts import cache_command

    cache_command.run(arguments, _cache(arguments, config_))


def _serve(arguments: argparse.Namespace, config_: settings.Settings) -> None:
    from internvl_runtime.server import app

    asyncio.run(app.serve(arguments.engine, config=config_, step_log=arguments.step_log))


def _inspect(arguments: argparse.Namespace, config_: settings.Settings) -> None:
    import rich.console

    from internvl_runtime.server import inspection

    if arguments.request:
        messages = inspection.read_request(arguments.request)
    else:
        messages = inspection.question(
            arguments.image, arguments.text, max_dynamic_patch=arguments.max_dynamic_patch
        )
    inspected = asyncio.run(inspection.inspect(arguments.model, messages, config_=config_))
    if arguments.json:
        print(json.dumps(inspected.describe()))
    else:
        inspection.show(inspected, console=rich.console.Console())


def _bench(arguments: argparse.Namespace, config_: settings.Settings) -> None:
    from internvl_runtime.bench import command

    del config_
    command.run(arguments)


def _plot_steps(arguments: argparse.Namespace, config_: settings.Settings) -> None:
    from internvl_runtime.bench import command

    del config_
    command.plot_steps(arguments)


def _synthesize(arguments: argparse.Namespace, config_: settings.Settings) -> None:
    recipe = synthesize.Recipe(arguments.shape, arguments.family, arguments.seed)
    report = progress.Progress("synthesize").step("write", unit="bytes")
    synthesize.write_checkpoint(
        recipe, arguments.output, tokenizer_model=config_.tokenizer_model, report=report
    )


def _cache(arguments: argparse.Namespace, config_: settings.Settings) -> caches.Cache:
    return caches.Cache(arguments.cache or config_.cache_root)


def _read_settings() -> settings.Settings:
    """Read every setting; raises StageError that names those that can not be."""
    try:
        return settings.Settings()
    except pydantic.ValidationError as e:
        told = [
            f"{settings.variable(each['loc'])}={each['input']!r}: {each['msg']}"
            for each in e.errors()
        ]
        raise _unreadable("; ".join(told)) from e
    except pydantic_settings.SettingsError as e:
        # A list that is no JSON.
        raise _unreadable(f"{e}: {e.__cause__}") from e


def _unreadable(message: str) -> errors.StageError:
    return errors.StageError(
        errors.Reason.INVALID_SPEC,
        message,
        remedy="docs/settings.md has every setting with its default; lists are JSON: "
        '["one", "two"]',
    )


def _end_with(error: errors.StageError, stage: str, termination_log: Path) -> int:
    """Tell why a stage ends; returns the exit code."""
    failure = {"reason": error.reason.value, "message": error.message, "remedy": error.remedy}
    _write_termination(termination_log, {"stage": stage, **failure})
    print(f"{stage}: {error.message}\nremedy: {error.remedy}", file=sys.stderr)
    return _EXITS.get(error.reason, EXIT_FAILED)


def _leave(number: int, frame: object) -> None:
    del frame
    sys.exit(128 + number)


def _write_termination(path: Path, content: dict[str, Any]) -> None:
    if path.exists():
        text = json.dumps({"schema": RESULT_SCHEMA, **content})
        if len(text) > _MOST_TERMINATION_BYTES and "message" in content:
            spare = len(text) - _MOST_TERMINATION_BYTES + len("…".encode()) * 2
            content = {**content, "message": content["message"][:-spare] + "…"}
            text = json.dumps({"schema": RESULT_SCHEMA, **content})
        path.write_text(text, encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="internvl-runtime", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    def add(name: str, run: Any, words: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=words, description=words)
        command.set_defaults(run=run)
        return command

    resolve = add("resolve", _resolve, "identify a source: weights key and dimensions")
    fetch = add("fetch", _fetch, "publish the weights of a source")
    convert = add("convert", _convert, "publish a rank checkpoint of weights")
    build = add("build", _build, "build, verify and publish an engine of a checkpoint")
    verify = add("verify", _verify, "repeat the recorded answers of a published engine")
    managed = add("cache", _manage_cache, "list, verify or prune what is published")
    serve = add("serve", _serve, "serve a published engine over the OpenAI API")
    inspect = add("inspect", _inspect, "show what a request becomes: grids, tiles, token ids")
    bench = add("bench", _bench, "load a server of the OpenAI API and measure it")
    plot = add("plot-steps", _plot_steps, "draw the step log that `serve --step-log` wrote")
    made_up = add("synthesize", _synthesize, "write a checkpoint with seeded random weights")
    for command in (resolve, fetch):
        command.add_argument("--source", required=True, help="JSON, see docs/reference.md")
    for command in (resolve, fetch, convert, build, managed):
        command.add_argument(
            "--cache", type=Path, help="cache folder (INTERNVL_RUNTIME_CACHE_ROOT)"
        )
    for command in (resolve, fetch, convert, build):
        command.add_argument(
            "--timeout", type=_count, metavar="SECONDS", help="end the stage after this time"
        )
    for command in (fetch, convert):
        command.add_argument("--weights", required=True, metavar="KEY")
    convert.add_argument("--dtype", default="bfloat16")
    convert.add_argument("--quantization", default="None", help="None or FP8")
    convert.add_argument("--tensor-parallel-size", type=int, default=1)
    build.add_argument("--checkpoint", required=True, metavar="KEY")
    build.add_argument("--backend", default="PyTorch")
    build.add_argument(
        "--architecture", help="for example sm_90 or cpu-x86_64; this machine's if left out"
    )
    build.add_argument(
        "--versions",
        type=_object,
        help='JSON, for example {"torch": "2.11.0"}; those installed if left out',
    )
    build.add_argument("--flags", type=_object, required=True, help="JSON of every build flag")
    managed.add_argument("action", choices=["list", "verify", "prune"])
    managed.add_argument(
        "--keep-engines", type=int, default=2, metavar="N", help="newest of each model that stay"
    )
    managed.add_argument(
        "--in-use", action="append", default=[], metavar="KEY", help="what stays in any case"
    )
    managed.add_argument(
        "--free-bytes",
        type=int,
        default=0,
        metavar="N",
        help="remove weights too, the oldest first, until so many bytes are freed",
    )
    managed.add_argument("--dry-run", action="store_true", help="show what would go")
    for command in (verify, serve):
        command.add_argument("--engine", type=Path, required=True, metavar="DIR")
    serve.add_argument(
        "--step-log", type=Path, metavar="FILE", help="write a JSON line for each engine step"
    )
    inspect.add_argument("model", type=Path, metavar="MODEL_DIR", help="a checkpoint's folder")
    inspect.add_argument("--image", type=Path, action="append", default=[], metavar="FILE")
    inspect.add_argument("--text", default="", help="the question; <image> takes the pictures")
    inspect.add_argument("--max-dynamic-patch", type=_count, help="most tiles of a picture's grid")
    inspect.add_argument("--request", type=Path, metavar="FILE", help="a chat request in JSON")
    inspect.add_argument("--json", action="store_true", help="print one JSON object")
    _add_bench_arguments(bench)
    plot.add_argument("log", type=Path, metavar="FILE")
    plot.add_argument("--output", type=Path, required=True, help="an .svg or .png file")
    made_up.add_argument("--shape", required=True)
    made_up.add_argument("--family", type=config.Family, choices=list(config.Family))
    made_up.add_argument("--seed", type=int, default=0)
    made_up.add_argument("--output", type=Path, required=True)
    return parser


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as e:
        raise argparse.ArgumentTypeError(f"no JSON: {e}") from e
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("no JSON object")
    return value


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text} is no number from 1")
    return int(text)


def _add_bench_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--url", required=True, help="the server, for example http://host:8000")
    parser.add_argument("--model", help="the name to ask for; left out, the server chooses")
    parser.add_argument(
        "--scenario", choices=["picture", "turns", "text", "mixed"], default="picture"
    )
    parser.add_argument("--requests", type=_count, default=100, help="conversations to send")
    parser.add_argument("--warmup", type=int, default=2, help="conversations before, unmeasured")
    parser.add_argument(
        "--concurrency", type=_count, help="conversations at once; 16 if no rate is given"
    )
    parser.add_argument("--rate", type=float, help="conversations that begin each second")
    parser.add_argument("--max-tokens", type=_count, default=64, help="tokens of each answer")
    parser.add_argument("--picture", default="1280x720", metavar="WIDTHxHEIGHT")
    parser.add_argument("--words", type=int, default=64, help="words of each question")
    parser.add_argument("--seed", type=int, help="repeats a run's pictures; random if left out")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="report.json, report.md, run.svg"
    )


if __name__ == "__main__":
    sys.exit(main())
