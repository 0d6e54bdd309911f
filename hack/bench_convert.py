"""Measures `convert` beside a durable copy of the same bytes on the same disk, and its memory.

    PYTHONPATH=runtime python hack/bench_convert.py --shape InternVL2_5-1B --work DIR [--layers 1]

`--layers N` keeps N layers of either stack: a model larger than the disk. Rounds alternate.
"""

import argparse
import dataclasses
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from internvl_runtime.artifacts import layout, safetensors_file, shapes, tensors
from internvl_runtime.model import config

_BLOCK_BYTES = 16 * 2**20


def main() -> None:
    """Print a table and JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=shapes.PUBLISHED, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    model = _model(arguments.shape, arguments.layers)
    weights = arguments.work / "weights.safetensors"
    arguments.work.mkdir(parents=True, exist_ok=True)
    infos = [safetensors_file.TensorInfo(n, "BF16", s) for n, s in tensors.list_tensors(model)]
    _write_random(weights, safetensors_file.size_of(infos), safetensors_file.header(infos))
    (arguments.work / "model.json").write_text(json.dumps([arguments.shape, arguments.layers]))
    copies, conversions, memory = [], [], []
    for number in range(arguments.rounds):
        copies.append(_copy(weights, arguments.work / "copy"))
        seconds, peak = _convert(arguments.work, arguments.ranks, number)
        conversions.append(seconds)
        memory.append(peak)
    size = weights.stat().st_size
    largest = max(info.bytes for info in infos)
    found = {
        "shape": arguments.shape,
        "layers": arguments.layers or "all",
        "ranks": arguments.ranks,
        "bytes": size,
        "largestTensor": largest,
        "boundBytes": 2 * largest + 512 * 2**20,
        "peakResidentBytes": max(memory),
        "copySeconds": [round(each, 2) for each in copies],
        "convertSeconds": [round(each, 2) for each in conversions],
        "speedOfCopying": round(statistics.median(copies) / statistics.median(conversions), 2),
    }
    print(json.dumps(found, indent=1))


def _model(shape: str, layers: int | None) -> config.ModelConfig:
    model = shapes.PUBLISHED[shape]
    if layers is None:
        return model
    return dataclasses.replace(
        model,
        language=dataclasses.replace(model.language, num_hidden_layers=layers),
        vision=dataclasses.replace(model.vision, num_hidden_layers=layers),
    )


def _write_random(path: Path, size: int, header: bytes) -> None:
    """Fill with finite bfloat16 numbers, whatever they mean."""
    block = np.random.default_rng(1).integers(0, 2**14, _BLOCK_BYTES // 2, np.uint16).tobytes()
    with path.open("wb") as file:
        file.write(header)
        while (left := size - file.tell()) > 0:
            file.write(block[:left])
        os.fsync(file.fileno())


def _copy(source: Path, target: Path) -> float:
    """Return the seconds of a copy, in blocks, that is durable at its end."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    _forget(source)
    began = time.monotonic()
    with source.open("rb") as given, (target / source.name).open("wb") as made:
        shutil.copyfileobj(given, made, _BLOCK_BYTES)
        made.flush()
        os.fsync(made.fileno())
    seconds = time.monotonic() - began
    shutil.rmtree(target)
    return seconds


def _convert(work: Path, ranks: int, number: int) -> tuple[float, int]:
    """Return the seconds and the peak memory of a conversion in a process of its own."""
    output = work / "output"
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir()
    _forget(work / "weights.safetensors")
    code = (
        "import sys; sys.path[:0] = ['hack']; import bench_convert; "
        f"bench_convert.run_conversion({str(work)!r}, {ranks})"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    shutil.rmtree(output)
    told = json.loads(done.stdout.splitlines()[-1])
    print(f"round {number}: {told}", file=sys.stderr)
    return told["seconds"], told["peak"]


def run_conversion(work: str, ranks: int) -> None:
    """Convert in this process, and print seconds and peak memory."""
    import resource

    from internvl_runtime.artifacts import convert, journal, tensor_stream

    shape, layers = json.loads((Path(work) / "model.json").read_text())
    model = _model(shape, layers)
    output = Path(work) / "output"
    began = time.monotonic()
    encoding = layout.Encoding("BF16")
    converted = journal.Journal(output / "journal")
    counter = convert._Counter(lambda *_: None, 1)
    with tensor_stream.Reader(Path(work)) as reader:
        for files in layout.layouts(model, ranks):
            convert._write_files(files, output, reader, converted, counter, encoding)
    seconds = time.monotonic() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": seconds, "peak": peak}))


def _forget(path: Path) -> None:
    """Let the kernel drop a file's pages, so that both read from the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


if __name__ == "__main__":
    main()
