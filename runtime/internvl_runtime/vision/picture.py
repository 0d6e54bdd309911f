"""One picture of a request: its size and grid now, its tiles when they are wanted."""

import dataclasses
import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from internvl_runtime.vision import decode, grid, tiles


@dataclasses.dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture whose pixels are decoded only when an engine asks for them."""

    content_hash: str
    """SHA-256 of the bytes and the tile limit: equal hashes have equal tiles."""
    width: int
    height: int
    grid: grid.Grid
    read: Callable[[], bytes] = dataclasses.field(repr=False, compare=False)
    """Returns the file's bytes."""
    size: int
    """Bytes held until the picture is answered."""
    max_pixels: int

    def load(self) -> npt.NDArray[np.uint8]:
        """Decode and cut: uint8 [N, 448, 448, 3]. Raises RequestError for broken data.

        The pixels are gone when this returns: a request holds its pictures as files.
        """
        with decode.open_picture(self.read(), max_pixels=self.max_pixels) as opened:
            return tiles.cut_tiles(decode.decode_rgb(opened), self.grid)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Frame:
    """One frame of a video: a single tile, made when the video was read."""

    content_hash: str
    width: int
    height: int
    tile: npt.NDArray[np.uint8] = dataclasses.field(repr=False, compare=False)

    @property
    def grid(self) -> grid.Grid:
        """A frame is one tile."""
        return grid.Grid(1, 1)

    @property
    def size(self) -> int:
        """Bytes held until the frame is answered."""
        return self.tile.nbytes

    def load(self) -> npt.NDArray[np.uint8]:
        """Return uint8 [1, 448, 448, 3]."""
        return self.tile[np.newaxis]


def open_picture(data: bytes, *, max_tiles: int, max_pixels: int) -> Picture:
    """Open a picture and choose its grid. Raises RequestError when it is none or too large."""
    with decode.open_picture(data, max_pixels=max_pixels) as opened:
        width, height = opened.size
    return Picture(
        content_hash=hashlib.sha256(b"%d:" % max_tiles + data).hexdigest(),
        width=width,
        height=height,
        grid=grid.choose_grid(width, height, max_tiles=max_tiles),
        read=lambda: data,
        size=len(data),
        max_pixels=max_pixels,
    )


class KnownPictures:
    """Remembers pictures by their data URLs: one that comes again is not even decoded as base64.

    For any thread. What is kept of a picture is a few hundred bytes.
    """

    def __init__(self, *, most: int) -> None:
        self._most = most
        self._pictures: OrderedDict[bytes, Picture] = OrderedDict()
        self._lock = threading.Lock()

    def open(
        self, url: str, read: Callable[[], bytes], *, max_tiles: int, max_pixels: int
    ) -> Picture:
        """Return the picture of a data URL, whose bytes `read` returns when they are needed."""
        key = hashlib.sha256(f"{max_tiles}:{max_pixels}:{url}".encode()).digest()
        with self._lock:
            known = self._pictures.get(key)
            if known:
                self._pictures.move_to_end(key)
        if known is None:
            known = open_picture(read(), max_tiles=max_tiles, max_pixels=max_pixels)
            with self._lock:
                self._pictures[key] = dataclasses.replace(known, read=_read_nothing)
                while len(self._pictures) > self._most:
                    self._pictures.popitem(last=False)
        return dataclasses.replace(known, read=read, size=len(url))


def _read_nothing() -> bytes:
    raise ValueError("a remembered picture has no bytes")


def frame_of(tile: npt.NDArray[np.uint8], *, width: int, height: int) -> Frame:
    """Return a frame of a video by its tile [448, 448, 3]."""
    digest = hashlib.sha256(b"frame:" + tile.tobytes()).hexdigest()
    return Frame(content_hash=digest, width=width, height=height, tile=tile)
