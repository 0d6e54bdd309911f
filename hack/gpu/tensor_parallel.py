"""Compares the PyTorch engine's answers on one GPU and on two, and their times.

PYTHONPATH=runtime:hack python -m gpu.tensor_parallel InternVL2_5-8B --dtypes float32 bfloat16

Writes random weights of a published shape, converts them for one rank and for two, and answers the
same requests with each: one at a time, then all at once. With one GPU alone both ranks share it and
talk through the host, which tells of tokens and nothing of speed.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from internvl_runtime.artifacts import convert, synthesize
from internvl_runtime.engine import interface, mpi, pixels, stepping
from internvl_runtime.engine.pytorch import loading, ranks
from internvl_runtime.model import config, prompt

REQUESTS, WORDS, ANSWER_TOKENS, TILES = 16, 60, 48, 3
LIMITS = interface.EngineLimits(
    max_sequence_tokens=8192, max_input_tokens=8191, max_batched_tokens=4096,
    max_batch_size=REQUESTS, max_tiles_per_image=12, max_tiles_per_request=13,
)  # fmt: skip
OPTIONS = loading.Options(kv_cache_bytes=4 * 2**30)
TIES = {"float32": 2e-3, "bfloat16": 0.12}
"""Margins of the two best logits below which rounding may decide."""


class _ThroughTheHost(ranks.Distributed):
    """Ranks on one GPU: NCCL wants one each."""

    def __init__(self, meeting: Path, *, rank: int, size: int) -> None:
        super().__init__(meeting, rank=rank, size=size, device="cpu")

    def add(self, part: torch.Tensor) -> torch.Tensor:
        return super().add(part.cpu()).to(part.device)

    def join(self, part: torch.Tensor) -> torch.Tensor:
        return super().join(part.float().cpu()).to(part)

    def share(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.copy_(super().share(tensor.float().cpu()))


def main() -> int:
    """Print a line for every dtype and number of ranks; returns 1 where tokens differ."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--tokenizer-model", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--rank-of", type=Path, help="internal: be a rank of this checkpoint")
    arguments = parser.parse_args()
    if arguments.rank_of:
        return _be_rank(arguments.rank_of)
    print(
        f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}, torch {torch.__version__}"
    )
    differing = 0
    with tempfile.TemporaryDirectory(dir=arguments.work) as name:
        published = Path(name) / "published"
        recipe = synthesize.Recipe(arguments.shape, None, 1)
        synthesize.write_checkpoint(
            recipe, published, tokenizer_model=arguments.tokenizer_model, report=_say_nothing
        )
        for dtype in arguments.dtypes:
            told = [_answers(published, Path(name) / f"{dtype}-{n}", dtype, n) for n in (1, 2)]
            differing += _compare(dtype, *told)
    return int(differing > 0)


def _answers(published: Path, checkpoint: Path, dtype: str, size: int) -> dict[str, Any]:
    checkpoint.mkdir()
    convert.write_checkpoint(published, checkpoint, dtype=dtype, ranks=size, report=_say_nothing)
    program = [sys.executable, "-m", "gpu.tensor_parallel", "-", f"--rank-of={checkpoint}",
               "--tokenizer-model=-"]  # fmt: skip
    with mpi.meeting(os.environ) as (_, environment):
        subprocess.run(mpi.command(size, program), env=environment, check=True)
    told: dict[str, Any] = json.loads((checkpoint / "told.json").read_text())
    shutil.rmtree(checkpoint)
    print(f"{dtype}, {size} ranks: " + ", ".join(f"{k} {v}" for k, v in told["times"].items()))
    return told


def _compare(dtype: str, one: dict[str, Any], two: dict[str, Any]) -> int:
    """Return how many answers differ before a tie."""
    differing = ties = 0
    for name, (tokens, margins) in one["answers"].items():
        other = two["answers"][name][0]
        places = (n for n, (a, b) in enumerate(zip(tokens, other, strict=True)) if a != b)
        first = next(places, None)
        if first is not None:
            ties += margins[first] < TIES[dtype]
            differing += margins[first] >= TIES[dtype]
    same = sum(one["batch"][name] == two["batch"][name] for name in one["batch"])
    print(f"{dtype}: {same} of {len(one['batch'])} answers of the batch equal in every token")
    print(f"{dtype}: {len(one['answers']) - ties - differing} of {len(one['answers'])} answers "
          f"equal in every token, {ties} up to a tie, {differing} different")  # fmt: skip
    return differing


def _be_rank(checkpoint: Path) -> int:
    rank, size = mpi.place(os.environ)
    is_shared = torch.cuda.device_count() < size
    torch.cuda.set_device(0 if is_shared else rank)
    group = None
    if size > 1:
        meeting = checkpoint / "meeting"
        group = (
            _ThroughTheHost(meeting, rank=rank, size=size)
            if is_shared
            else ranks.Distributed(meeting, rank=rank, size=size, device="cuda")
        )
    model = config.read_model_config(checkpoint / "model")
    if rank and group:
        loading.follow(checkpoint, model, LIMITS, device="cuda", group=group)
        return 0
    engine = loading.load_engine(
        checkpoint, model, LIMITS, options=OPTIONS, device="cuda", group=group
    )
    with contextlib.closing(engine):
        told = _measure(engine, model.language.vocab_size)
    (checkpoint / "told.json").write_text(json.dumps(told))
    return 0


def _measure(engine: stepping.Engine, vocabulary: int) -> dict[str, Any]:
    asked = [_request(number, vocabulary) for number in range(REQUESTS)]
    list(stepping.answer(engine, *_request(REQUESTS, vocabulary)))
    answers, alone = {}, []
    for request, tiles in asked[:4]:
        wanted = dataclasses.replace(request.sampling, log_probabilities=2)
        came = [time.monotonic()]
        steps = []
        for step in stepping.answer(engine, dataclasses.replace(request, sampling=wanted), tiles):
            steps.append(step)
            came.append(time.monotonic())
        alone.append((came[1] - came[0], (came[-1] - came[1]) / (len(came) - 2)))
        told = [each for step in steps for each in step.log_probabilities]
        margins = [each.top[0][1] - each.top[1][1] for each in told]
        answers[request.request_id] = [t for s in steps for t in s.token_ids], margins
    engine.reset()
    began = time.monotonic()
    tokens: dict[str, list[int]] = {}
    for request, tiles in asked:
        engine.submit(request, tiles)
    while engine.has_work:
        for step in engine.step():
            if step.error:
                raise step.error
            tokens.setdefault(step.request_id, []).extend(step.token_ids)
    took = time.monotonic() - began
    count = sum(map(len, tokens.values()))
    first, between = (sorted(times)[len(times) // 2] for times in zip(*alone, strict=True))
    times = {
        "first token alone": f"{1000 * first:.0f} ms",
        "between tokens alone": f"{1000 * between:.1f} ms",
        f"{REQUESTS} at once": f"{count / took:.0f} tokens/s",
        "GPU": f"{torch.cuda.max_memory_reserved() / 2**30:.1f} GiB",
    }
    return {"answers": answers, "batch": tokens, "times": times}


def _request(number: int, vocabulary: int) -> tuple[stepping.Submitted, dict[str, Any]]:
    rng = random.Random(number)  # noqa: S311 - no cryptography
    length = TILES * config.TOKENS_PER_TILE if number % 2 else 0
    words = [rng.randrange(5, vocabulary // 2) for _ in range(WORDS)]
    placements = (prompt.ImagePlacement(0, 0, length),) if length else ()
    asked = stepping.Submitted(
        request_id=str(number),
        prompt=prompt.Prompt((*[0] * length, *words), placements),
        content_hashes=[str(number)] if length else [],
        sampling=interface.Sampling(max_tokens=ANSWER_TOKENS, temperature=0.0),
        stop_token_ids=frozenset(),
    )
    shape = (TILES, *pixels.TILE_SHAPE)
    tiles = np.random.default_rng(number).integers(0, 256, shape, dtype=np.uint8)
    return asked, {str(number): tiles} if length else {}


def _say_nothing(done: int, total: int) -> None:
    del done, total


if __name__ == "__main__":
    mpi.end_with(main)
