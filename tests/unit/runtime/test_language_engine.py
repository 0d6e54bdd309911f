"""The command line of `trtllm-build`, for every published model and number of ranks."""

import json
from pathlib import Path

import pytest
from internvl_doubles import trtllm_build
from internvl_runtime import errors
from internvl_runtime.artifacts import language_engine, shapes
from internvl_runtime.engine import interface
from internvl_runtime.model import tensor_parallel

GOLDEN = Path(__file__).parents[2] / "data" / "trtllm-build-commands.json"
LIMITS = interface.EngineLimits(
    max_sequence_tokens=32768, max_input_tokens=32767, max_batched_tokens=8192, max_batch_size=8,
    max_tiles_per_image=12, max_tiles_per_request=52,
)  # fmt: skip


def commands():
    return {
        f"{name} tp {ranks}": " ".join(
            language_engine.command(
                Path("/cache/checkpoints/c"),
                Path("/cache/tmp/e/language"),
                LIMITS,
                dtype="bfloat16",
                workers=ranks,
                timing_cache=Path("/cache/tmp/timings-sm_90/language"),
            )
        )
        for name, model in shapes.PUBLISHED.items()
        for ranks in tensor_parallel.legal_sizes(model.language)
    }


def test_the_commands_are_the_recorded_ones():
    assert commands() == json.loads(GOLDEN.read_text())


@pytest.mark.parametrize("command", commands().values(), ids=commands())
def test_the_published_parser_takes_them(command):
    parsed = trtllm_build.parser().parse_args(command.split()[1:])
    # One request may have floor(rows / batch) of them.
    assert parsed.max_prompt_embedding_table_size // parsed.max_batch_size == 52 * 256
    assert parsed.kv_cache_type == "paged"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (trtllm_build.FAILURES["gpu-memory"], errors.Reason.OUT_OF_GPU_MEMORY),
        (trtllm_build.FAILURES["architecture"], errors.Reason.UNSUPPORTED_GPU),
        (trtllm_build.FAILURES["versions"], errors.Reason.INCOMPATIBLE_VERSIONS),
        (trtllm_build.FAILURES["disk"], errors.Reason.DISK_FULL),
        (trtllm_build.FAILURES["unknown"], errors.Reason.BUILD_FAILED),
        ("trtllm-build: error: unrecognized arguments: --x", errors.Reason.INCOMPATIBLE_VERSIONS),
    ],
)
def test_what_a_log_says_has_a_reason(line, reason):
    failure = language_engine._failure(1, ["some line", line])
    assert failure.reason is reason
    assert line.split(":")[-1].strip()[:20] in failure.message


def test_a_killed_build_ran_out_of_memory():
    assert language_engine._failure(-9, []).reason is errors.Reason.OUT_OF_MEMORY
