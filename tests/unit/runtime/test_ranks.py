"""A rank's own GPU, and what an error of the ranks' connection means."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from internvl_runtime import errors
from internvl_runtime.artifacts import shapes
from internvl_runtime.engine import interface
from internvl_runtime.engine.pytorch import loading, ranks
from internvl_runtime.model import config

OF_NCCL = (
    "NCCL error in: NCCLUtils.cpp:93, invalid usage, NCCL version 2.28.9\n"
    "ncclInvalidUsage: This usually reflects invalid usage of NCCL library.\n"
    "Last error:\nDuplicate GPU detected : rank 1 and rank 0 both on CUDA device 60\n"
    "Exception raised from ~ncclConfig at frames:"
)
OF_NCCL_LOST = (
    "NCCL error in: ProcessGroupNCCL.cpp:3690, remote process exited or there was a network error\n"
    "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting."
)


class LoadedError(Exception):
    """Ends a load at its first file."""


class Group:
    """Stands for the ranks of a model, as the second one sees them."""

    rank, size = 1, 2


@pytest.mark.parametrize("load", [loading.load_engine, loading.follow])
def test_weights_are_read_to_the_gpu_of_the_rank(load, monkeypatch):
    read = []

    def load_weights(path, place):
        read.append((path.name, place))
        raise LoadedError

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(loading.weights, "load_weights", load_weights)
    limits = interface.EngineLimits(
        max_sequence_tokens=64, max_input_tokens=63, max_batched_tokens=64, max_batch_size=1,
        max_tiles_per_image=1, max_tiles_per_request=1,
    )  # fmt: skip
    model = shapes.tiny_model(shapes.TINY, config.Family.QWEN2, vocab_size=512)
    options = {"options": loading.Options()} if load is loading.load_engine else {}
    with pytest.raises(LoadedError):
        load(Path(), model, limits, device="cuda", group=Group(), **options)
    assert [place for _, place in read] == [torch.device("cuda:1")]


def fail_with(monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(dist, "init_process_group", fail)


def test_what_nccl_can_not_do_is_told_with_its_words(monkeypatch, tmp_path):
    fail_with(monkeypatch, dist.DistBackendError(OF_NCCL))
    with pytest.raises(errors.StageError) as raised:
        ranks.Distributed(tmp_path / "ranks", rank=1, size=2, device="cpu")
    assert raised.value.reason is errors.Reason.RANK_FAILED
    assert raised.value.message == (
        "NCCL does not connect the GPUs: ncclInvalidUsage: This usually reflects invalid usage of"
        " NCCL library. Last error: Duplicate GPU detected : rank 1 and rank 0 both on CUDA device"
        " 60"
    )
    assert "NCCL_DEBUG=INFO" in raised.value.remedy


@pytest.mark.parametrize(
    "error",
    [dist.DistBackendError(OF_NCCL_LOST), RuntimeError("Connection closed by peer [127.0.0.1]")],
)
def test_another_rank_s_end_is_not_this_one_s_failure(monkeypatch, tmp_path, error):
    fail_with(monkeypatch, error)
    with pytest.raises(errors.RankLostError, match="another rank is gone"):
        ranks.Distributed(tmp_path / "ranks", rank=1, size=2, device="cpu")


def test_a_device_s_own_error_stays_what_it_is(monkeypatch, tmp_path):
    fail_with(monkeypatch, torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(torch.OutOfMemoryError):
        ranks.Distributed(tmp_path / "ranks", rank=1, size=2, device="cpu")
