"""The ranks that share a model, as one of them sees the others."""

from typing import Protocol

import torch


class Group(Protocol):
    """Sums and joins the tensors of all ranks; every rank makes the same calls in one order."""

    @property
    def size(self) -> int:
        """Ranks."""
        ...

    def add(self, part: torch.Tensor) -> torch.Tensor:
        """Return the sum of every rank's part; `part` may be overwritten."""
        ...

    def join(self, part: torch.Tensor) -> torch.Tensor:
        """Return every rank's part [..., n], end to end by rank: [..., ranks * n]."""
        ...


class _Alone:
    size = 1

    def add(self, part: torch.Tensor) -> torch.Tensor:
        return part

    def join(self, part: torch.Tensor) -> torch.Tensor:
        return part


ALONE: Group = _Alone()
"""Of one rank."""
