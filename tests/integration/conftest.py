from pathlib import Path

import pytest
import runtime_process
from internvl_runtime.artifacts import shapes
from internvl_runtime.model import config

CASES = [
    (shapes.TINY, config.Family.QWEN2),
    (shapes.TINY, config.Family.INTERNLM2),
    (shapes.TINY_6B_VISION, config.Family.QWEN2),
    (shapes.TINY_6B_VISION, config.Family.INTERNLM2),
]


def synthesize_checkpoint(folder, shape, family, seed=5):
    done = runtime_process.run(
        "synthesize", "--shape", shape, "--family", family.value, "--seed", seed,
        "--output", folder, cache="/nonexistent",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return Path(folder)


@pytest.fixture(scope="session", params=CASES, ids=lambda case: "-".join(map(str, case)))
def checkpoint(request, tmp_path_factory):
    return synthesize_checkpoint(tmp_path_factory.mktemp("checkpoint"), *request.param)


@pytest.fixture(scope="session")
def qwen_checkpoint(tmp_path_factory):
    return synthesize_checkpoint(tmp_path_factory.mktemp("qwen"), *CASES[0])


@pytest.fixture(scope="session")
def qwen_engine(qwen_checkpoint, tmp_path_factory):
    cache = tmp_path_factory.mktemp("qwen-cache")
    return runtime_process.build_engine(qwen_checkpoint, cache=cache)


@pytest.fixture(scope="module")
def server(qwen_engine):
    with runtime_process.serve(qwen_engine) as running:
        yield running
