import os
import sys
from pathlib import Path

import nvidia_image
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


@pytest.fixture(scope="session", params=CASES, ids=lambda case: "-".join(map(str, case)))
def checkpoint(request, tmp_path_factory):
    return runtime_process.synthesize(tmp_path_factory.mktemp("checkpoint"), *request.param)


@pytest.fixture(scope="session", autouse=True)
def own_mpirun():
    """The locked Open MPI, whichever the machine has."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        yield


@pytest.fixture(scope="session")
def qwen_checkpoint(tmp_path_factory):
    return runtime_process.synthesize(tmp_path_factory.mktemp("qwen"), *CASES[0])


@pytest.fixture(scope="session")
def qwen_engine(qwen_checkpoint, tmp_path_factory):
    cache = tmp_path_factory.mktemp("qwen-cache")
    return runtime_process.build_engine(qwen_checkpoint, cache=cache)


@pytest.fixture(scope="module")
def server(qwen_engine):
    with runtime_process.serve(qwen_engine) as running:
        yield running


@pytest.fixture(scope="module")
def engine(request, qwen_checkpoint, tmp_path_factory):
    """An engine of (backend, ranks); TensorRT's stands on the fakes."""
    backend, ranks = request.param
    with pytest.MonkeyPatch.context() as patch:
        if backend == "TensorRT":
            nvidia_image.enter(patch, tmp_path_factory.mktemp("site"), gpus=ranks)
        cache = tmp_path_factory.mktemp("cache")
        yield runtime_process.build_engine(
            qwen_checkpoint, cache=cache, backend=backend, ranks=ranks
        )
