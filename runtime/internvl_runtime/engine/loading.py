"""Loads an engine of either backend, as rank 0 or as one behind it."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from internvl_runtime import errors
from internvl_runtime.engine import device, folder, mpi, stepping
from internvl_runtime.engine.pytorch import loading as pytorch
from internvl_runtime.engine.pytorch import ranks

Options = pytorch.Options


class Seat(NamedTuple):
    """A process among those that share a model."""

    rank: int
    size: int
    meeting: Path
    """A folder that all of them see, where nobody has met before."""


ALONE = Seat(rank=0, size=1, meeting=Path())


def take_seat(meeting: Path, *, threads: int = 0) -> Seat:
    """Return where mpirun has placed this process, and share the machine with the other ranks.

    `threads` of torch on a CPU; 0: the cores, divided by the ranks.
    """
    import torch

    rank, size = mpi.place(os.environ)
    if size > 1:
        mpi.die_with_parent()
        threads = threads or max(1, torch.get_num_threads() // size)
    if threads:
        torch.set_num_threads(threads)
    return Seat(rank, size, meeting)


@contextlib.contextmanager
def _naming_short_memory() -> Iterator[None]:
    """Say what a GPU without room means, also where other ranks wait for the step that failed."""
    import torch

    try:
        yield
    except (torch.OutOfMemoryError, torch.AcceleratorError, errors.RankFailedError) as e:
        cause = e.__cause__ if isinstance(e, errors.RankFailedError) else e
        is_short = isinstance(cause, torch.OutOfMemoryError) or (
            # Of the driver, which torch's allocator has not asked.
            isinstance(cause, torch.AcceleratorError) and "out of memory" in str(cause)
        )
        if cause is None or not is_short:
            raise
        raise errors.StageError(
            errors.Reason.OUT_OF_GPU_MEMORY,
            f"the engine does not fit into the GPU: {mpi.describe(cause)}",
            remedy="see that nothing else runs on the GPU; else build the engine with a smaller "
            "maxBatchedTokens or maxBatchSize, raise tensorParallelSize, or use a larger GPU",
        ) from e


@_naming_short_memory()
def load(
    opened: folder.EngineFolder,
    *,
    options: Options,
    seat: Seat = ALONE,
    load_picture: stepping.LoadPicture | None = None,
    tells_logits: bool = False,
) -> stepping.Engine:
    """Load an engine as rank 0; the other ranks `follow` at the same time.

    `tells_logits` lets TensorRT tell the most likely tokens, too, which PyTorch always does.
    Raises StageError where it can not be loaded.
    """
    _check_seat(opened, seat)
    if opened.checkpoint is None:
        from internvl_runtime.engine.tensorrt import loading as tensorrt

        return tensorrt.load_engine(
            opened.path,
            opened.limits,
            picture_cache_bytes=options.picture_cache_bytes,
            kv_cache_bytes=options.kv_cache_bytes,
            load_picture=load_picture,
            tells_logits=tells_logits,
        )
    place = device.torch_device(opened.architecture)
    return pytorch.load_engine(
        opened.checkpoint,
        opened.model,
        opened.limits,
        options=options,
        device=place,
        kernels=opened.kernels,
        load_picture=load_picture,
        group=_meet(seat, place) if seat.size > 1 else None,
    )


@_naming_short_memory()
def follow(
    opened: folder.EngineFolder, *, options: Options, seat: Seat, tells_logits: bool = False
) -> None:
    """Be a rank behind rank 0, with the arguments that it loads with, until that one ends."""
    _check_seat(opened, seat)
    if opened.checkpoint is None:
        from internvl_runtime.engine.tensorrt import loading as tensorrt

        tensorrt.follow(
            opened.path,
            opened.limits,
            kv_cache_bytes=options.kv_cache_bytes,
            tells_logits=tells_logits,
        )
        return
    place = device.torch_device(opened.architecture)
    pytorch.follow(
        opened.checkpoint,
        opened.model,
        opened.limits,
        device=place,
        kernels=opened.kernels,
        group=_meet(seat, place),
    )


def _meet(seat: Seat, place: str) -> ranks.Distributed:
    import torch

    if place == "cuda":
        torch.cuda.set_device(seat.rank)
    return ranks.Distributed(seat.meeting / "ranks", rank=seat.rank, size=seat.size, device=place)


def _check_seat(opened: folder.EngineFolder, seat: Seat) -> None:
    if seat.size != opened.ranks:
        raise errors.EngineIncompatibleError(
            f"the engine is for {opened.ranks} ranks, and mpirun has started {seat.size}",
            remedy="let `internvl-runtime serve` start the ranks",
        )
