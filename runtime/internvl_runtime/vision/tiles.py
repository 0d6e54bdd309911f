"""Resampling and cutting, byte for byte as classic Pillow does it."""

import numpy as np
import numpy.typing as npt
import PIL.Image

from internvl_runtime.model import config
from internvl_runtime.vision import grid as grids


def resize(picture: PIL.Image.Image, *, width: int, height: int) -> PIL.Image.Image:
    """Resize by bicubic filtering, the horizontal pass first.

    Pillow 12.2 and later choose the order of the passes by themselves, which
    changes bytes; two calls of one pass each give the classic result on every
    version (https://github.com/python-pillow/Pillow/pull/9549).
    """
    bicubic = PIL.Image.Resampling.BICUBIC
    return picture.resize((width, picture.height), bicubic).resize((width, height), bicubic)


def cut_tiles(picture: PIL.Image.Image, grid: grids.Grid) -> npt.NDArray[np.uint8]:
    """Return the tiles of an RGB picture, row by row, and the thumbnail last: [N, 448, 448, 3]."""
    size = config.TILE_SIZE
    resized = resize(picture, width=size * grid.columns, height=size * grid.rows)
    rows = np.asarray(resized).reshape(grid.rows, size, grid.columns, size, 3)
    tiles = rows.transpose(0, 2, 1, 3, 4).reshape(-1, size, size, 3)
    if len(tiles) > 1:
        thumbnail = np.asarray(resize(picture, width=size, height=size))
        tiles = np.concatenate([tiles, thumbnail[np.newaxis]])
    return np.ascontiguousarray(tiles)
