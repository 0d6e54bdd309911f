"""Tensors of a checkpoint folder, by name."""

from collections.abc import Iterator
from pathlib import Path

import safetensors
import torch


class Weights:
    """A view of named tensors below a prefix."""

    def __init__(self, tensors: dict[str, torch.Tensor], prefix: str = "") -> None:
        self._tensors = tensors
        self._prefix = prefix

    def below(self, name: str) -> "Weights":
        """Return the view below `name`."""
        return Weights(self._tensors, f"{self._prefix}{name}.")

    def layers(self, count: int) -> Iterator["Weights"]:
        """Yield the views of numbered layers."""
        return (self.below(str(layer)) for layer in range(count))

    def __getitem__(self, name: str) -> torch.Tensor:
        """Return a tensor."""
        return self._tensors[self._prefix + name]

    def pop(self, name: str) -> torch.Tensor:
        """Return a tensor and forget it: whoever merges it need not hold it twice."""
        return self._tensors.pop(self._prefix + name)

    def get(self, name: str) -> torch.Tensor | None:
        """Return a tensor, or None where the model has none."""
        return self._tensors.get(self._prefix + name)


def load_weights(path: Path, device: torch.device) -> Weights:
    """Read a safetensors file: memory-mapped on the CPU, straight to a GPU otherwise."""
    with safetensors.safe_open(path, framework="pt", device=str(device)) as file:
        return Weights({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
