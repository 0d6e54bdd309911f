"""The language model as a TensorRT-LLM engine: `trtllm-build` of 1.2.1 as a process.

Its flags are those of the published command (`tensorrt_llm/commands/build.py`);
it has never run where this was written (`tests/contract`, `tests/doubles`).
"""

import collections
import contextlib
import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

from internvl_runtime import errors
from internvl_runtime.artifacts import progress
from internvl_runtime.engine import interface
from internvl_runtime.model import config

PROGRAM = "trtllm-build"
ENGINE_CONFIG = "config.json"
TOKENS_PER_BLOCK = 32
_LAST_LINES = 20
_KILLED = -9


def command(
    checkpoint: Path,
    output: Path,
    limits: interface.EngineLimits,
    *,
    dtype: str,
    workers: int,
    timing_cache: Path,
) -> list[str]:
    """Return the command that builds every rank's engine of a checkpoint.

    The prompt table has rows for every tile of every request of a batch:
    TensorRT-LLM divides it by the batch size to tell one request's share.
    """
    rows = limits.max_batch_size * limits.max_tiles_per_request * config.TOKENS_PER_TILE
    return [
        PROGRAM,
        "--checkpoint_dir", str(checkpoint),
        "--output_dir", str(output),
        "--max_batch_size", str(limits.max_batch_size),
        "--max_input_len", str(limits.max_input_tokens),
        "--max_seq_len", str(limits.max_sequence_tokens),
        "--max_num_tokens", str(limits.max_batched_tokens),
        "--max_beam_width", "1",
        "--max_prompt_embedding_table_size", str(rows),
        "--gemm_plugin", dtype,
        "--gpt_attention_plugin", dtype,
        "--kv_cache_type", "paged",
        "--tokens_per_block", str(TOKENS_PER_BLOCK),
        # Reuse of keys and values, and prompts in chunks, stand on paged context attention.
        "--use_paged_context_fmha", "enable",
        "--context_fmha", "enable",
        "--remove_input_padding", "enable",
        "--input_timing_cache", str(timing_cache),
        "--output_timing_cache", str(timing_cache),
        "--workers", str(workers),
        "--log_level", "info",
    ]  # fmt: skip


def build(arguments: list[str], *, ranks: int, output: Path, report: progress.Report) -> None:
    """Run the command; its log goes on to ours, its finished engines to `report`.

    Raises StageError with the reason that its log tells.
    """
    last: collections.deque[str] = collections.deque(maxlen=_LAST_LINES)
    report(0, ranks)
    try:
        process = subprocess.Popen(  # noqa: S603 - a list of our own, no shell
            arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
    except FileNotFoundError as e:
        raise errors.StageError(
            errors.Reason.INCOMPATIBLE_VERSIONS,
            f"this image has no {arguments[0]}",
            remedy="build with the builder image of TensorRT-LLM 1.2.1",
        ) from e
    done = 0
    with process, _killing(process):
        for line in process.stdout or ():
            print(line, end="", flush=True)
            last.append(line.strip())
            if _FINISHED.search(line):
                done = min(done + 1, ranks)
                report(done, ranks)
    if process.returncode:
        raise _failure(process.returncode, list(last))
    _check_output(output, ranks)
    report(ranks, ranks)


@contextlib.contextmanager
def _killing(process: subprocess.Popen[str]) -> Iterator[None]:
    """End the process with what ends us, a deadline for example."""
    try:
        yield
    except BaseException:
        process.kill()
        raise


_FINISHED = re.compile(r"Engine serialized\. Total time")
"""The log's line behind each rank's engine."""

_KNOWN = (
    (
        re.compile(r"out of memory|OutOfMemory|CUDA_ERROR_OUT_OF_MEMORY|cudaMalloc", re.I),
        errors.Reason.OUT_OF_GPU_MEMORY,
        "lower maxBatchSize or maxBatchedTokens, raise tensorParallelSize, or use a larger GPU",
    ),
    (
        re.compile(r"Unsupported (model )?architecture|not supported on SM|unsupported SM", re.I),
        errors.Reason.UNSUPPORTED_GPU,
        "use a GPU that TensorRT-LLM 1.2.1 supports (Ampere or later)",
    ),
    (
        re.compile(r"factory function returned nullptr|CASK|version (tag|mismatch)", re.I),
        errors.Reason.INCOMPATIBLE_VERSIONS,
        "use the builder image as it is: TensorRT 10.14.1.48 belongs to TensorRT-LLM 1.2.1",
    ),
    (
        re.compile(r"No space left on device", re.I),
        errors.Reason.DISK_FULL,
        "make spec.cache.size larger, or remove engines that nobody uses",
    ),
    (
        re.compile(r"Required but not provided tensors|safetensors", re.I),
        errors.Reason.DIGEST_MISMATCH,
        "remove the checkpoint from the cache and convert again: it is damaged",
    ),
    (
        re.compile(r"unrecognized arguments|invalid choice", re.I),
        errors.Reason.INCOMPATIBLE_VERSIONS,
        "use the builder image of TensorRT-LLM 1.2.1, whose flags these are",
    ),
)
"""What the log of a failed build says, and what it means."""


def _failure(status: int, last: list[str]) -> errors.StageError:
    text = "\n".join(last)
    words = " / ".join(line for line in last if line)[-1500:]
    if status == _KILLED:
        return errors.StageError(
            errors.Reason.OUT_OF_MEMORY,
            f"{PROGRAM} was killed, for want of memory as a rule: {words}",
            remedy="raise engine.build.resources: it needs about twice the checkpoint",
        )
    for pattern, reason, remedy in _KNOWN:
        if pattern.search(text):
            return errors.StageError(reason, f"{PROGRAM} failed: {words}", remedy=remedy)
    return errors.StageError(
        errors.Reason.BUILD_FAILED,
        f"{PROGRAM} ended with {status}: {words}",
        remedy="read the builder's log",
    )


def _check_output(output: Path, ranks: int) -> None:
    wanted = [ENGINE_CONFIG, *(f"rank{rank}.engine" for rank in range(ranks))]
    missing = [name for name in wanted if not (output / name).is_file()]
    version = None
    if not missing:
        version = json.loads((output / ENGINE_CONFIG).read_text("utf-8")).get("version")
    if missing or version is None:
        raise errors.StageError(
            errors.Reason.BUILD_FAILED,
            f"{PROGRAM} ended well, but {', '.join(missing) or 'the version'} is missing",
            remedy="use the builder image of TensorRT-LLM 1.2.1",
        )
