"""What the engine runs on: architecture and versions, as the keys name them."""

import contextlib
import dataclasses
import importlib.metadata
import itertools
import os
import platform
import shutil
from typing import Any

from internvl_runtime import errors
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
    """Those that CUDA shows to this process."""


def read_gpu() -> Gpu | None:
    """Ask the driver, without torch and without a CUDA context; None where there is no GPU.

    Raises StageError where the driver can not tell of one that is there.
    """
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    with contextlib.ExitStack() as stack:
        stack.callback(pynvml.nvmlShutdown)
        try:
            return _describe_gpus(pynvml)
        except pynvml.NVMLError as e:
            raise errors.StageError(
                errors.Reason.UNSUPPORTED_GPU,
                f"the node's driver does not tell of its GPU: {e}",
                remedy="run nvidia-smi on the node: a GPU that is lost there wants a restart",
            ) from e


def _describe_gpus(pynvml: Any) -> Gpu | None:
    count = _count_visible(pynvml.nvmlDeviceGetCount(), os.environ.get("CUDA_VISIBLE_DEVICES"))
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


def _count_visible(count: int, named: str | None) -> int:
    """Return how many of so many GPUs CUDA shows: those that its variable names.

    By numbers or UUIDs, up to the first that there is not (CUDA C++ Programming Guide,
    Environment Variables).
    """
    if named is None:
        return count
    each = (name.strip() for name in named.split(","))
    shown = itertools.takewhile(
        lambda name: int(name) < count if name.isdecimal() else name.startswith(("GPU-", "MIG-")),
        each,
    )
    return min(count, sum(1 for _ in shown))


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
    for name, distribution in _PACKAGES.get((backend, torch_device(architecture)), {}).items():
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            version = importlib.metadata.version(distribution)
            # Neither a local build nor its packaging changes what an engine depends on.
            found[name] = version.partition("+")[0].partition(".post")[0]
    return found
