"""Answers the recorded prompts with a built engine, in as many processes as it has ranks."""

import argparse
import collections
import contextlib
import dataclasses
import gc
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import safetensors
import safetensors.torch
import torch

from internvl_runtime import errors
from internvl_runtime.engine import device, folder, interface, loading, mpi, verification
from internvl_runtime.store import cache as caches

_PICTURE_BYTES = 512 * 2**20
"""Of features."""
_SECONDS = 3600.0
"""How long ranks may take to load and to answer: one that hangs says nothing."""
_END_SECONDS = 5.0
_LAST_LINES = 100
"""Of the ranks' log: mpirun's notice is at its end."""
_ANSWERS = "answers.safetensors"
_FAILURE = "-failure.json"
_Told = dict[str, tuple[list[int], list[interface.TokenLogProbabilities]]]
"""Tokens, and what was thought of each, by the prompt's name."""


@dataclasses.dataclass(frozen=True)
class Answers:
    """What an engine has answered."""

    answers: list[verification.Answered]
    seconds: float
    memory: dict[str, int]
    """Of rank 0's GPU."""


def answer(path: Path, inputs: Mapping[str, Any], cache: caches.Cache) -> Answers:
    """Load the engine in a folder, made of these inputs, and answer.

    Raises StageError where a rank can not load it, or it answers nonsense.
    """
    opened = folder.describe(path, inputs, cache)
    if not opened.speaks_mpi:
        return _answer(opened, loading.ALONE)
    program = [
        sys.executable, "-m", __name__, f"--folder={opened.path}", f"--cache-root={cache.root}",
        f"--inputs={json.dumps(inputs)}",
    ]  # fmt: skip
    with mpi.meeting(os.environ) as (meeting, environment):
        _run_ranks([*program, f"--meeting={meeting}"], opened.ranks, environment, meeting)
        return _read(opened, meeting / _ANSWERS)


def _run_ranks(
    program: Sequence[str], ranks: int, environment: Mapping[str, str], meeting: Path
) -> None:
    with subprocess.Popen(  # noqa: S603 - our own program
        mpi.command(ranks, program),
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        preexec_fn=mpi.die_with_parent,  # noqa: PLW1509 - no thread of ours holds a lock
    ) as process:
        said = _pass_on(process)
    for failure in sorted(meeting.glob(f"*{_FAILURE}")):
        raw = json.loads(failure.read_text(encoding="utf-8"))
        raise errors.StageError(errors.Reason(raw["reason"]), raw["message"], remedy=raw["remedy"])
    if process.returncode:
        told = mpi.describe_end(said, process.returncode, ranks=ranks, doing="answering")
        raise mpi.failure(told)


def _pass_on(process: subprocess.Popen[str]) -> str:
    """Write what ranks and mpirun say into our log until they end; return the last of it."""
    last: collections.deque[str] = collections.deque(maxlen=_LAST_LINES)
    is_late = threading.Event()

    def give_up() -> None:
        is_late.set()
        process.kill()

    watch = threading.Timer(_SECONDS, give_up)
    watch.start()
    try:
        for line in process.stdout or ():
            sys.stderr.write(line)
            last.append(line)
        process.wait()
    except BaseException:
        # mpirun ends its ranks first.
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_END_SECONDS)
        process.kill()
        raise
    finally:
        watch.cancel()
    if is_late.is_set():
        raise mpi.failure(f"the engine's ranks have not answered within {_SECONDS:g} s")
    return "".join(last)


def _answer(opened: folder.EngineFolder, seat: loading.Seat) -> Answers:
    tokens = opened.load_tokenizer()
    engine = loading.load(
        _for_one_request(opened), options=_options(), seat=seat, tells_logits=True
    )
    started = time.monotonic()
    answers = verification.answer(engine, opened.model, tokens)
    seconds = round(time.monotonic() - started, 3)
    # Of ranks that failed mpirun ends the others, which would not hear of this.
    engine.close()
    # What TensorRT takes torch does not know.
    on_gpu = opened.checkpoint and device.torch_device(opened.architecture) == "cuda"
    memory = {"peakGpuBytes": torch.cuda.max_memory_allocated()} if on_gpu else {}
    del engine
    gc.collect()
    return Answers(answers, seconds, memory)


def _for_one_request(opened: folder.EngineFolder) -> folder.EngineFolder:
    """Return the engine with a cache for one request; the executor's table has its batch's size."""
    if opened.checkpoint is None:
        return opened
    return dataclasses.replace(opened, limits=dataclasses.replace(opened.limits, max_batch_size=1))


def _options() -> loading.Options:
    return loading.Options(picture_cache_bytes=_PICTURE_BYTES)


def _write(answers: Answers, path: Path) -> None:
    told: _Told = {each.name: (each.token_ids, each.told) for each in answers.answers}
    features = {each.name: each.features for each in answers.answers if each.features is not None}
    metadata = {
        "told": msgspec.json.encode(told).decode(),
        "seconds": json.dumps(answers.seconds),
        "memory": json.dumps(answers.memory),
    }
    safetensors.torch.save_file(features, path, metadata)


def _read(opened: folder.EngineFolder, path: Path) -> Answers:
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
        features = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    told = msgspec.json.decode(metadata["told"], type=_Told)
    answers = [
        verification.Answered(request, *told[request.request_id], features.get(request.request_id))
        for request in verification.requests(opened.model, opened.load_tokenizer())
    ]
    return Answers(answers, json.loads(metadata["seconds"]), json.loads(metadata["memory"]))


def main() -> int:
    """Be one rank; `answer` starts all of them."""
    parser = argparse.ArgumentParser(prog="internvl-answering")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--cache-root", type=Path, required=True)
    parser.add_argument("--inputs", type=json.loads, required=True)
    parser.add_argument("--meeting", type=Path, required=True)
    arguments = parser.parse_args()
    meeting = arguments.meeting
    seat = loading.take_seat(meeting)
    try:
        cache = caches.Cache(arguments.cache_root)
        opened = folder.describe(arguments.folder, arguments.inputs, cache)
        if seat.rank:
            loading.follow(
                _for_one_request(opened), options=_options(), seat=seat, tells_logits=True
            )
        else:
            _write(_answer(opened, seat), meeting / _ANSWERS)
    except errors.StageError as e:
        message = f"rank {seat.rank} of {seat.size}: {e.message}"
        failure = {"reason": e.reason.value, "message": message, "remedy": e.remedy}
        # What mpirun ends within the writing has no name yet.
        written = meeting / f"{seat.rank}.part"
        written.write_text(json.dumps(failure), encoding="utf-8")
        written.rename(meeting / f"{seat.rank}{_FAILURE}")
        return 1
    return 0


if __name__ == "__main__":
    mpi.end_with(main)
