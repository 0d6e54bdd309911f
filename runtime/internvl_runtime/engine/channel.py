"""Messages between the server and the engine worker.

A message is four bytes of little-endian length and MessagePack, on a Unix
stream socket. Tiles travel beside it: as descriptors of anonymous shared
memory (memfd) on a Unix packet socket, so that nothing has a name that could
be left behind, whoever dies.
"""

import asyncio
import os
import socket
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from internvl_runtime import errors
from internvl_runtime.engine import interface
from internvl_runtime.model import prompt

VERSION = 4
_LENGTH_BYTES = 4
_PACKET_BYTES = 4096

Tiles = npt.NDArray[np.uint8]


class Submit(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """Server to worker: generate an answer."""

    request_id: str
    token_ids: tuple[int, ...]
    placements: tuple[prompt.ImagePlacement, ...]
    content_hashes: tuple[str, ...]
    """Of picture i; its tiles come when the worker asks for them."""
    stop_token_ids: frozenset[int]
    sampling: interface.Sampling
    constraint: interface.Constraint | None
    priority: int


class Cancel(msgspec.Struct, frozen=True, tag=True):
    """Server to worker: stop an answer."""

    request_id: str


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """Why something could not be done; `status` 0 where the client is not to blame."""

    message: str
    parameter: str | None = None
    code: str | None = None
    status: int = 0


class PictureFailed(msgspec.Struct, frozen=True, tag=True):
    """Server to worker: a picture that was asked for can not be loaded."""

    content_hash: str
    failure: Failure


class Stop(msgspec.Struct, frozen=True, tag=True):
    """Server to worker: end."""


class Joined(msgspec.Struct, frozen=True, tag=True):
    """Worker to server, first of all; ranks but 0 keep the connection and say no more."""

    rank: int


class Ready(msgspec.Struct, frozen=True, tag=True):
    """Worker to server: loaded and verified."""

    version: int
    blocks: int
    """Of the key/value cache."""


class Failed(msgspec.Struct, frozen=True, tag=True):
    """Worker to server, of any rank: can not load."""

    reason: str
    message: str
    remedy: str


class LoadPicture(msgspec.Struct, frozen=True, tag=True):
    """Worker to server: send the tiles of picture `index` of a request."""

    request_id: str
    index: int


class StepResult(msgspec.Struct, frozen=True, kw_only=True):
    """What one engine step made for one request."""

    request_id: str
    token_ids: tuple[int, ...] = ()
    log_probabilities: tuple[interface.TokenLogProbabilities, ...] = ()
    finish_reason: interface.FinishReason | None = None
    start: interface.Start | None = None
    failure: Failure | None = None


class Steps(msgspec.Struct, frozen=True, tag=True):
    """Worker to server: engine steps, for every request in them."""

    steps: tuple[StepResult, ...]
    reports: tuple[interface.StepReport, ...]


class Heartbeat(msgspec.Struct, frozen=True, tag=True):
    """Worker to server, every second: alive, and for how long in the same step."""

    step_seconds: float
    load: interface.EngineLoad


ToWorker = Submit | Cancel | PictureFailed | Stop
ToServer = Joined | Ready | Failed | LoadPicture | Steps | Heartbeat

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


def failure_of(error: errors.RuntimeBaseError) -> Failure:
    """Return what travels of an error."""
    if isinstance(error, errors.RequestError):
        return Failure(
            message=error.message, parameter=error.parameter, code=error.code, status=error.status
        )
    return Failure(message=str(error))


def error_of(failure: Failure) -> errors.RuntimeBaseError:
    """Return the error that has travelled."""
    if not failure.status:
        return errors.EngineUnavailableError(failure.message)
    return errors.RequestError(
        failure.message,
        parameter=failure.parameter,
        code=failure.code,
        status=failure.status,
    )


def tiles_path(socket_path: Path) -> Path:
    """Return the path of the packet socket beside the stream socket."""
    return socket_path.with_suffix(".tiles")


class TilesPacket(msgspec.Struct, frozen=True):
    """Travels with the descriptor of a picture's tiles."""

    content_hash: str
    count: int
    """Tiles of 448 x 448 x 3 bytes."""


def listen_for_tiles(path: Path) -> socket.socket:
    """Return a socket that the worker connects to."""
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listening.bind(str(path))
    listening.listen(1)
    listening.setblocking(False)
    return listening


def connect_for_tiles(path: Path) -> socket.socket:
    """Return the worker's end."""
    connected = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connected.connect(str(path))
    return connected


def send_tiles(connected: socket.socket, content_hash: str, tiles: Tiles) -> None:
    """Copy tiles [N, 448, 448, 3] into shared memory and hand it over. Raises OSError."""
    descriptor = os.memfd_create("internvl-tiles")
    try:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(np.ascontiguousarray(tiles).data)
        packet = msgspec.msgpack.encode(TilesPacket(content_hash, len(tiles)))
        socket.send_fds(connected, [packet], [descriptor])
    finally:
        os.close(descriptor)


def receive_tiles(
    connected: socket.socket, tile_shape: tuple[int, ...]
) -> tuple[str, Tiles] | None:
    """Wait for a picture's tiles; returns None when the server is gone."""
    packet, descriptors, _, _ = socket.recv_fds(connected, _PACKET_BYTES, 1)
    if not packet:
        return None
    described = msgspec.msgpack.decode(packet, type=TilesPacket)
    # A mapping would hold a descriptor for as long as the tiles wait.
    with os.fdopen(descriptors[0], "rb") as file:
        file.seek(0)
        tiles = np.fromfile(file, dtype=np.uint8)
    return described.content_hash, tiles.reshape((described.count, *tile_shape))
