"""A fake `pynvml` that tells of H200s: FAKE_GPUS of them, one if it is not set."""

import os
import types


class NVMLError(Exception):
    """Of the real module."""


def nvmlInit():  # noqa: N802
    """Begin."""


nvmlShutdown = nvmlInit  # noqa: N816


def nvmlDeviceGetCount():  # noqa: N802
    """Return how many the test wants."""
    return int(os.environ.get("FAKE_GPUS", "1"))


def nvmlDeviceGetHandleByIndex(index):  # noqa: N802
    """Return something."""
    return index


def nvmlDeviceGetCudaComputeCapability(handle):  # noqa: N802
    """Return Hopper's."""
    return 9, 0


def nvmlDeviceGetName(handle):  # noqa: N802
    """Return the product."""
    return "NVIDIA H200"


def nvmlDeviceGetMemoryInfo(handle):  # noqa: N802
    """Return 141 GB."""
    return types.SimpleNamespace(total=150_754_820_096)


def nvmlSystemGetDriverVersion():  # noqa: N802
    """Return a driver."""
    return "580.95.05"


def nvmlSystemGetCudaDriverVersion():  # noqa: N802
    """Return the newest CUDA that the driver serves, 13.0."""
    return int(os.environ.get("FAKE_DRIVER_CUDA", "13000"))
