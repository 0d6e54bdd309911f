"""Messages between the server and the engine worker.

A message is four bytes of little-endian length and MessagePack. Tiles do not
travel in messages: they lie in shared memory, and whoever takes them removes
their name at once, so that a crash leaves at most what was on its way.
"""

import asyncio
import os
import uuid
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from internvl_runtime.engine import interface
from internvl_runtime.model import prompt

VERSION = 2
_LENGTH_BYTES = 4
_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - where Linux keeps shared memory
_PREFIX = "internvl-tiles-"


class SharedArray(msgspec.Struct, frozen=True):
    """A uint8 array in shared memory."""

    name: str
    shape: tuple[int, ...]


class Submit(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """Server to worker: generate an answer."""

    request_id: str
    token_ids: tuple[int, ...]
    placements: tuple[prompt.ImagePlacement, ...]
    tiles: tuple[SharedArray, ...]
    stop_token_ids: frozenset[int]
    sampling: interface.Sampling
    constraint: interface.Constraint | None


class Cancel(msgspec.Struct, frozen=True, tag=True):
    """Server to worker: stop an answer."""

    request_id: str


class Stop(msgspec.Struct, frozen=True, tag=True):
    """Server to worker: end."""


class Ready(msgspec.Struct, frozen=True, tag=True):
    """Worker to server: loaded and verified."""

    version: int


class Failed(msgspec.Struct, frozen=True, tag=True):
    """Worker to server: can not load."""

    reason: str
    message: str
    remedy: str


class StepResult(msgspec.Struct, frozen=True):
    """What one engine step made for one request."""

    request_id: str
    token_ids: tuple[int, ...]
    log_probabilities: tuple[interface.TokenLogProbabilities, ...] = ()
    finish_reason: interface.FinishReason | None = None
    error: str | None = None
    parameter: str | None = None
    """The field of the request that is wrong, where the error is the client's."""


class Steps(msgspec.Struct, frozen=True, tag=True):
    """Worker to server: one engine step, for every request in it."""

    steps: tuple[StepResult, ...]


ToWorker = Submit | Cancel | Stop
ToServer = Ready | Failed | Steps

_to_worker: msgspec.msgpack.Decoder[ToWorker] = msgspec.msgpack.Decoder(ToWorker)
_to_server: msgspec.msgpack.Decoder[ToServer] = msgspec.msgpack.Decoder(ToServer)


def encode(message: ToWorker | ToServer) -> bytes:
    """Return the bytes that carry a message."""
    body = msgspec.msgpack.encode(message)
    return len(body).to_bytes(_LENGTH_BYTES, "little") + body


async def read_to_worker(reader: asyncio.StreamReader) -> ToWorker:
    """Read the server's next message; raises IncompleteReadError when it is gone."""
    return _to_worker.decode(await _read_body(reader))


async def read_to_server(reader: asyncio.StreamReader) -> ToServer:
    """Read the worker's next message; raises IncompleteReadError when it is gone."""
    return _to_server.decode(await _read_body(reader))


async def _read_body(reader: asyncio.StreamReader) -> bytes:
    length = int.from_bytes(await reader.readexactly(_LENGTH_BYTES), "little")
    return await reader.readexactly(length)


def share(array: npt.NDArray[np.uint8]) -> SharedArray:
    """Copy an array into shared memory. Raises OSError when /dev/shm is full."""
    name = f"{_PREFIX}{os.getpid()}-{uuid.uuid4().hex}"
    path = _SHARED_MEMORY / name
    try:
        path.write_bytes(array.data)
    except OSError:
        path.unlink(missing_ok=True)
        raise
    return SharedArray(name, array.shape)


def take(shared: SharedArray) -> npt.NDArray[np.uint8]:
    """Map a shared array, copy-on-write, and remove its name."""
    path = _SHARED_MEMORY / shared.name
    array: npt.NDArray[Any] = np.memmap(path, dtype=np.uint8, mode="c", shape=shared.shape)
    path.unlink()
    return array


def drop(shared: SharedArray) -> None:
    """Remove a shared array that nobody took."""
    (_SHARED_MEMORY / shared.name).unlink(missing_ok=True)
