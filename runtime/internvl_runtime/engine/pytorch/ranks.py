"""The ranks that share a model, as one of them sees the others."""

import datetime
import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, Protocol, TypeVar

import torch
import torch.distributed as dist

from internvl_runtime import errors
from internvl_runtime.engine import mpi

_P = ParamSpec("_P")
_R = TypeVar("_R")
_BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}
"""By device; what rank 0 tells lies on the CPU."""
_PATIENCE = datetime.timedelta(days=3650)
"""Ranks wait for the next step for as long as nobody asks; mpirun ends those of a dead one."""
_NCCL_LOST = "ncclRemoteError"
_NCCL_FAILURE = re.compile(r"nccl[A-Z]\w+: .*")
"""In an error's text: the kind, and what NCCL says of it."""


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


def _naming_lost_ranks(method: Callable[_P, _R]) -> Callable[_P, _R]:
    """Say what the error of a connection means; torch raises RuntimeError for each.

    What NCCL says of this rank's own side becomes StageError.
    """

    @functools.wraps(method)
    def told(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            return method(*args, **kwargs)
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            # Of this rank's own device.
            raise
        except RuntimeError as e:
            text, _, _ = str(e).partition("Exception raised from")
            words = " ".join(text.split())
            failure = _NCCL_FAILURE.search(words)
            if failure and not failure[0].startswith(_NCCL_LOST):
                raise mpi.failure(f"NCCL does not connect the GPUs: {failure[0]}") from e
            raise errors.RankLostError(f"another rank is gone: {words}") from e

    return told


class Distributed:
    """Processes of one machine: gloo between CPUs, NCCL between GPUs.

    Every method but `close` raises RankLostError, and StageError where NCCL can not work.
    """

    @_naming_lost_ranks
    def __init__(self, meeting: Path, *, rank: int, size: int, device: str) -> None:
        """Wait until all ranks have met by a file that none of them has made before.

        GPUs are connected at once, each rank's current one: what hinders them is told here.
        """
        self.rank, self.size = rank, size
        own = torch.device("cuda", torch.cuda.current_device()) if device == "cuda" else None
        dist.init_process_group(
            _BACKENDS[device],
            init_method=f"file://{meeting}",
            rank=rank,
            world_size=size,
            timeout=_PATIENCE,
            device_id=own,
        )

    @_naming_lost_ranks
    def add(self, part: torch.Tensor) -> torch.Tensor:
        """Return the sum of every rank's part; on CPUs 16 bits are summed as 32."""
        if part.is_cuda or part.dtype is torch.float32:
            dist.all_reduce(part)
            return part
        wide = part.to(torch.float32)
        dist.all_reduce(wide)
        return wide.to(part.dtype)

    @_naming_lost_ranks
    def join(self, part: torch.Tensor) -> torch.Tensor:
        """Return every rank's part [..., n], end to end by rank: [..., ranks * n]."""
        parts = [torch.empty_like(part) for _ in range(self.size)]
        dist.all_gather(parts, part.contiguous())
        return torch.cat(parts, dim=-1)

    @_naming_lost_ranks
    def least(self, number: int) -> int:
        """Return the smallest of every rank's numbers."""
        found = torch.tensor(number)
        dist.all_reduce(found, dist.ReduceOp.MIN)
        return int(found)

    @_naming_lost_ranks
    def tell(self, numbers: list[int]) -> None:
        """Give numbers to the other ranks, which `hear` them; rank 0's way."""
        dist.broadcast(torch.tensor(len(numbers)), 0)
        dist.broadcast(torch.tensor(numbers, dtype=torch.int64), 0)

    @_naming_lost_ranks
    def hear(self) -> list[int]:
        """Wait for what rank 0 tells."""
        count = torch.empty((), dtype=torch.int64)
        dist.broadcast(count, 0)
        numbers = torch.empty(int(count), dtype=torch.int64)
        dist.broadcast(numbers, 0)
        return numbers.tolist()

    @_naming_lost_ranks
    def share(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return rank 0's tensor on every rank; the other ones give one of its shape and dtype."""
        dist.broadcast(tensor, 0)
        return tensor

    def close(self) -> None:
        """Part."""
        dist.destroy_process_group()
