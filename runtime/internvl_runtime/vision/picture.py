"""One picture of a request: its size and grid now, its tiles when they are wanted."""

import dataclasses
import hashlib

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
    data: bytes = dataclasses.field(repr=False, compare=False)
    max_pixels: int

    @property
    def size(self) -> int:
        """Bytes held until the picture is answered."""
        return len(self.data)

    def load(self) -> npt.NDArray[np.uint8]:
        """Decode and cut: uint8 [N, 448, 448, 3]. Raises RequestError for broken data.

        The pixels are gone when this returns: a request holds its pictures as files.
        """
        with decode.open_picture(self.data, max_pixels=self.max_pixels) as opened:
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
        data=data,
        max_pixels=max_pixels,
    )


def frame_of(tile: npt.NDArray[np.uint8], *, width: int, height: int) -> Frame:
    """Return a frame of a video by its tile [448, 448, 3]."""
    digest = hashlib.sha256(b"frame:" + tile.tobytes()).hexdigest()
    return Frame(content_hash=digest, width=width, height=height, tile=tile)
