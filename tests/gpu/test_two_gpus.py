"""Two ranks with a GPU each, over NCCL: run by hand on such a machine, where CI has none.

PYTHONPATH=runtime:tests/support python -m pytest tests/gpu/test_two_gpus.py -c /dev/null
"""

import json

import pytest
import runtime_process
import served_ranks
import torch
from internvl_runtime.artifacts import shapes
from internvl_runtime.model import config

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two GPUs")

LEFT = 3 * 2**30
"""Bytes for the contexts of torch and NCCL, and nothing else."""
MANY_TOKENS = 1500
"""A GPU's answers of so many tokens still run when SIGTERM comes."""


@pytest.fixture(scope="module", params=served_ranks.MODELS, ids=str)
def source(request, tmp_path_factory):
    return served_ranks.describe_source(request.param, tmp_path_factory.mktemp("checkpoint"))


def test_two_gpus_give_the_tokens_of_one(source, tmp_path):
    one, two = (
        runtime_process.build_engine_of(source, cache=tmp_path, ranks=ranks, for_gpu=True)
        for ranks in (1, 2)
    )
    assert served_ranks.answers_at_once(two) == served_ranks.answers_at_once(one)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder, cache = tmp_path_factory.mktemp("checkpoint"), tmp_path_factory.mktemp("cache")
    runtime_process.synthesize(folder, shapes.TINY, config.Family.QWEN2)
    return runtime_process.build_engine(folder, cache=cache, ranks=2, for_gpu=True)


@pytest.mark.parametrize("name", [0, 1])
@pytest.mark.parametrize("phase", ["start", "idle", "decode", "drain"])
def test_a_killed_rank_ends_the_whole(two_ranks, phase, name, tmp_path):
    served_ranks.check_killed(phase, name, two_ranks, tmp_path / "told")


def test_sigterm_under_load_loses_no_stream(two_ranks):
    served_ranks.check_sigterm(two_ranks, tokens=MANY_TOKENS)


@pytest.mark.parametrize("full", [0, 1])
def test_a_gpu_that_is_full_is_told(two_ranks, tmp_path, full):
    told = tmp_path / "told"
    told.touch()
    free, _ = torch.cuda.mem_get_info(full)
    taken = torch.empty(free - LEFT, dtype=torch.uint8, device=f"cuda:{full}")
    try:
        with runtime_process.serve(two_ranks, wait=False, termination_log=str(told)) as server:
            code = server.process.wait(timeout=60)
    finally:
        del taken
        torch.cuda.empty_cache()
    said = json.loads(told.read_text())
    print(f"GPU {full} is full: code {code}: {said['reason']}: {said['message']}")
    assert (code, said["reason"]) == (80, "OutOfGPUMemory")
