"""What the engine runs on: architecture and versions, as the keys name them."""

import importlib.metadata
import platform

_MACHINES = {"x86_64": "x86_64", "aarch64": "arm64"}
_PACKAGES = {"PyTorch": ("torch",)}


def cpu_architecture() -> str:
    """Return `cpu-x86_64` or `cpu-arm64`."""
    machine = platform.machine()
    return f"cpu-{_MACHINES.get(machine, machine)}"


def versions(backend: str) -> dict[str, str]:
    """Return the versions of the packages that an engine of this backend depends on."""
    return {package: _public_version(package) for package in _PACKAGES[backend]}


def _public_version(package: str) -> str:
    return importlib.metadata.version(package).partition("+")[0]


def default_device() -> str:
    """Return `cuda` where there is a GPU, else `cpu`."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
