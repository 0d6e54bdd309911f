"""What the engine runs on: architecture and versions, as the keys name them."""

import contextlib
import dataclasses
import importlib.metadata
import platform
import shutil
from typing import Any

from internvl_runtime.engine import mpi

_MACHINES = {"x86_64": "x86_64", "aarch64": "arm64"}
_CPU_PREFIX = "cpu-"
_FIRST_FP8 = 89
"""Ada, compute capability 8.9."""
_TENSORRT_CUDA_MAJOR = 13
"""Of TensorRT-LLM 1.2.1."""
_PACKAGES = {
    ("PyTorch", "cpu"): {"torch": "torch"},
    ("PyTorch", "cuda"): {"torch": "torch", "flashinfer": "flashinfer-python"},
    ("TensorRT", "cuda"): {"tensorrt": "tensorrt", "tensorrt_llm": "tensorrt_llm"},
}
"""By backend and device: the names that keys use, and those of the distributions."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpu:
    """The GPUs of this machine, which are all of one kind."""

    product: str
    architecture: str
    """`sm_90` for compute capability 9.0."""
    memory: int
    """Bytes of one."""
    driver: str
    cuda_major: int
    """Of the newest CUDA that the driver serves."""
    count: int


def read_gpu() -> Gpu | None:
    """Ask the driver, without torch and without a CUDA context; None where there is no GPU."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    with contextlib.ExitStack() as stack:
        stack.callback(pynvml.nvmlShutdown)
        count = pynvml.nvmlDeviceGetCount()
        if not count:
            return None
        first = pynvml.nvmlDeviceGetHandleByIndex(0)
        major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(first)
        return Gpu(
            product=pynvml.nvmlDeviceGetName(first),
            architecture=f"sm_{major}{minor}",
            memory=pynvml.nvmlDeviceGetMemoryInfo(first).total,
            driver=pynvml.nvmlSystemGetDriverVersion(),
            cuda_major=pynvml.nvmlSystemGetCudaDriverVersion() // 1000,
            count=count,
        )


def gpu_count() -> int:
    """Return how many GPUs this machine has, at least one where engines are built for them."""
    gpu = read_gpu()
    return gpu.count if gpu else 1


def wanted_cuda_major(backend: str) -> int | None:
    """Return the major version of the CUDA that a backend's libraries are built on, if known."""
    if backend == "TensorRT":
        return _TENSORRT_CUDA_MAJOR
    _, _, local = importlib.metadata.version("torch").partition("+cu")
    return int(local) // 10 if local.isdecimal() else None


def shared_memory() -> int:
    """Return the bytes that /dev/shm may hold, 0 where there is none."""
    try:
        return shutil.disk_usage(mpi.SHARED_MEMORY).total
    except OSError:
        return 0


def cpu_architecture() -> str:
    """Return `cpu-x86_64` or `cpu-arm64`."""
    machine = platform.machine()
    return f"{_CPU_PREFIX}{_MACHINES.get(machine, machine)}"


def architecture() -> str:
    """Return the architecture of the GPU where there is one, else of the CPU."""
    gpu = read_gpu()
    return gpu.architecture if gpu else cpu_architecture()


def architecture_like(wanted: str) -> str:
    """Return what this machine has of the kind of `wanted`: every machine has a CPU."""
    return cpu_architecture() if torch_device(wanted) == "cpu" else architecture()


def has_fp8(architecture: str) -> bool:
    """Whether products of FP8 can be computed; on a CPU they are emulated."""
    return (
        torch_device(architecture) == "cpu" or int(architecture.removeprefix("sm_")) >= _FIRST_FP8
    )


def torch_device(architecture: str) -> str:
    """Return `cpu` or `cuda`."""
    return "cpu" if architecture.startswith(_CPU_PREFIX) else "cuda"


def describe_machine() -> dict[str, Any]:
    """Return what is worth knowing of where an engine was built."""
    gpu = read_gpu()
    return dataclasses.asdict(gpu) if gpu else {"architecture": cpu_architecture()}


def versions(backend: str, architecture: str) -> dict[str, str]:
    """Return the versions of the packages that an engine depends on; without what lacks."""
    found = {}
    for name, distribution in _PACKAGES[backend, torch_device(architecture)].items():
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            version = importlib.metadata.version(distribution)
            # Neither a local build nor its packaging changes what an engine depends on.
            found[name] = version.partition("+")[0].partition(".post")[0]
    return found
