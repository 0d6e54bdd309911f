"""Counts, from a trace, how often an engine's steps make the host wait for the GPU.

PYTHONPATH=runtime:hack python -m gpu.count_syncs ENGINE_DIR
"""

import argparse
import random
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from internvl_runtime.engine import folder, interface, loading, pixels, stepping
from internvl_runtime.engine.pytorch import core
from internvl_runtime.model import config, prompt

TILES, WORDS, ANSWER_TOKENS, SEQUENCES = 13, 55, 64, 16
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")
"""Calls of the CUDA runtime that wait; cudaMemcpyAsync may, where host memory is pageable."""


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engine", type=Path)
    opened = folder.open_engine(parser.parse_args().engine)
    engine = loading.load(opened, options=loading.Options())
    if not isinstance(engine, core.Engine):
        parser.error(f"{opened.backend} tells no trace; give an engine of PyTorch")
    for number in range(SEQUENCES):
        engine.submit(*_request(number, opened.model.language.vocab_size))
    _step(engine, 4)
    _describe("prefill and decode", _trace(engine, 12))
    while any(sequence.is_prefilling for sequence in engine.scheduler.running):
        engine.step()
    _describe("decode", _trace(engine, 24))


def _request(number: int, vocabulary: int) -> tuple[stepping.Submitted, dict[str, np.ndarray]]:
    rng = random.Random(number)  # noqa: S311 - no cryptography
    length = TILES * config.TOKENS_PER_TILE
    words = [rng.randrange(5, vocabulary // 2) for _ in range(WORDS)]
    asked = stepping.Submitted(
        request_id=str(number),
        prompt=prompt.Prompt((*[0] * length, *words), (prompt.ImagePlacement(0, 0, length),)),
        content_hashes=[str(number)],
        sampling=interface.Sampling(max_tokens=ANSWER_TOKENS, temperature=0.0),
        stop_token_ids=frozenset(),
    )
    tiles = np.random.default_rng(number).integers(
        0, 256, (TILES, *pixels.TILE_SHAPE), dtype=np.uint8
    )
    return asked, {str(number): tiles}


def _step(engine: stepping.Engine, count: int) -> None:
    for _ in range(count):
        engine.step()


def _trace(engine: stepping.Engine, steps: int) -> dict[str, float]:
    """Return calls for each step, by name."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profiled:
        _step(engine, steps)
    calls = Counter(event.name for event in profiled.events())
    waits = {name: calls[name] / steps for name in WAITS}
    copies = sum(count for name, count in calls.items() if name.startswith("Memcpy"))
    pageable = sum(count for name, count in calls.items() if "Pageable" in name)
    launches = sum(calls[name] for name in ("cudaLaunchKernel", "cudaLaunchKernelExC"))
    return {
        **waits,
        "copies": copies / steps,
        "pageable copies": pageable / steps,
        "kernel launches": launches / steps,
    }


def _describe(phase: str, counted: dict[str, float]) -> None:
    for name, each in counted.items():
        print(f"{phase:20} {name:24} {each:8.2f} a step")


if __name__ == "__main__":
    main()
