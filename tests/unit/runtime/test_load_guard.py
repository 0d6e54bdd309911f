"""What an engine of several ranks wants of a machine, before anything is loaded."""

import types

import pytest
from internvl_runtime import errors
from internvl_runtime.engine import device, folder

ENOUGH = 2**30


@pytest.fixture
def machine(monkeypatch):
    """Two H200 whose driver serves CUDA 13, and room to talk."""
    made = types.SimpleNamespace(count=2, cuda_major=13, driver="580.95.05", shared=ENOUGH)
    monkeypatch.setattr(device, "read_gpu", lambda: made)
    monkeypatch.setattr(device, "shared_memory", lambda: made.shared)
    return made


def engine(ranks=2, **changed):
    return {"architecture": "sm_90", "backend": "TensorRT", "ranks": ranks, **changed}


def test_a_machine_that_fits_is_taken(machine):
    folder.check_machine(**engine())
    machine.shared = 0
    folder.check_machine(**engine(ranks=1))
    machine.count = machine.cuda_major = 0
    folder.check_machine(**engine(architecture="cpu-x86_64", backend="PyTorch"))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"count": 1}, "is for 2 GPUs, this pod has 1"),
        ({"shared": 64 * 2**20}, "/dev/shm, which has 64 MiB here and needs 512 MiB"),
        ({"cuda_major": 12, "driver": "570.1"}, "driver 570.1 serves CUDA 12.*want CUDA 13"),
    ],
)
def test_a_machine_that_does_not_fit_is_told(machine, changed, words):
    vars(machine).update(changed)
    with pytest.raises(errors.EngineIncompatibleError, match=words) as caught:
        folder.check_machine(**engine())
    assert caught.value.remedy


@pytest.mark.parametrize(("version", "wanted"), [("2.11.0+cu130", 13), ("2.11.0+cpu", None)])
def test_torch_says_which_cuda_it_wants(monkeypatch, version, wanted):
    monkeypatch.setattr(device.importlib.metadata, "version", lambda _: version)
    assert device.wanted_cuda_major("PyTorch") == wanted
