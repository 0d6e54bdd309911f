"""What an engine of several ranks wants of a machine, before anything is loaded."""

import sys
import types

import pytest
from internvl_doubles import nvml
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


@pytest.fixture
def four_gpus(monkeypatch):
    monkeypatch.setenv("FAKE_GPUS", "4")
    monkeypatch.setitem(sys.modules, "pynvml", nvml)


@pytest.mark.parametrize(
    ("named", "count"),
    [
        (None, 4), ("0,1", 2), ("3", 1), ("0, 1, 2, 3", 4), ("0,7,1", 1), ("2,-1,3", 1),
        ("GPU-8932f937-d72c,GPU-c2dd1234-0000,MIG-1", 3),
    ],
)  # fmt: skip
def test_gpus_are_those_that_cuda_shows(four_gpus, monkeypatch, named, count):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if named is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert device.read_gpu().count == count


@pytest.mark.parametrize("named", ["", "-1", "NoDevFiles"])
def test_a_process_that_is_shown_no_gpu_has_none(four_gpus, monkeypatch, named):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert device.read_gpu() is None


def test_a_gpu_that_is_lost_is_told(four_gpus, monkeypatch):
    def fail(_):
        raise nvml.NVMLError("GPU is lost")

    monkeypatch.setattr(nvml, "nvmlDeviceGetHandleByIndex", fail)
    with pytest.raises(errors.StageError, match="does not tell of its GPU: GPU is lost") as caught:
        device.read_gpu()
    assert caught.value.reason is errors.Reason.UNSUPPORTED_GPU


@pytest.mark.parametrize(("version", "wanted"), [("2.11.0+cu130", 13), ("2.11.0+cpu", None)])
def test_torch_says_which_cuda_it_wants(monkeypatch, version, wanted):
    monkeypatch.setattr(device.importlib.metadata, "version", lambda _: version)
    assert device.wanted_cuda_major("PyTorch") == wanted
