"""What is told of an engine that can not be loaded."""

import types
from pathlib import Path

import pytest
import torch
from internvl_runtime import errors
from internvl_runtime.engine import loading, worker

SEAT = loading.Seat(rank=0, size=1, meeting=Path())


def fail_with(monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(loading.pytorch, "load_engine", fail)
    opened = types.SimpleNamespace(
        ranks=1, checkpoint=Path(), architecture="cpu-x86_64", model=None, limits=None, kernels=None
    )
    return lambda: loading.load(opened, options=loading.Options(), seat=SEAT)


def within_a_step(error):
    failed = errors.RankFailedError("rank 0 failed within a step of all ranks")
    failed.__cause__ = error
    return failed


@pytest.mark.parametrize("wrap", [lambda error: error, within_a_step])
def test_a_gpu_that_is_too_small_is_told(monkeypatch, wrap):
    load = fail_with(monkeypatch, wrap(torch.OutOfMemoryError("CUDA out of memory.\n20 GiB")))
    with pytest.raises(errors.StageError) as caught:
        load()
    assert caught.value.reason is errors.Reason.OUT_OF_GPU_MEMORY
    assert caught.value.message == (
        "the engine does not fit into the GPU: OutOfMemoryError: CUDA out of memory. 20 GiB"
    )
    assert "tensorParallelSize" in caught.value.remedy


def test_a_driver_that_has_no_memory_is_told(monkeypatch):
    load = fail_with(monkeypatch, torch.AcceleratorError("CUDA error: out of memory"))
    with pytest.raises(errors.StageError, match="does not fit into the GPU"):
        load()


@pytest.mark.parametrize(
    "error",
    [
        within_a_step(ValueError()),
        errors.RankLostError(),
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
    ],
)
def test_other_errors_stay_what_they_are(monkeypatch, error):
    with pytest.raises(type(error)):
        fail_with(monkeypatch, error)()


def test_an_error_that_nobody_has_foreseen_reaches_the_server_with_its_words(caplog):
    told = worker._failed(KeyError("lm_head"))
    assert (told.reason, told.message) == (
        "CrashLoop",
        "the engine does not load: KeyError: 'lm_head'",
    )
    assert caplog.messages == ["the engine does not load"]
