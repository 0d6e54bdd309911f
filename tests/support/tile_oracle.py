"""Grids and tiles by another way than the product's: from the description of the authors' code.

Nothing of `internvl_runtime` is used. The resampler works on integer weights
as sparse matrices, the grid search on exact distances between doubles.
"""

import fractions
import functools
import math

import numpy as np
import scipy.sparse

_SIZE = 448
_FRACTION_BITS = 22


def grid_of(width, height, limit):
    """Return columns and rows: the nearest ratio, and of equally near ones the last that is
    smaller than twice the picture's area, in the order of their areas."""
    ratio = width / height
    shapes = sorted(
        {(i, j) for i in range(1, limit + 1) for j in range(1, limit + 1) if i * j <= limit},
        key=lambda shape: shape[0] * shape[1],
    )
    # A difference of doubles is a double: comparing exact fractions of them changes nothing.
    distance = {shape: fractions.Fraction(abs(ratio - shape[0] / shape[1])) for shape in shapes}
    nearest = min(distance.values())
    equals = [shape for shape in shapes if distance[shape] == nearest]
    chosen = equals[0]
    for shape in equals[1:]:
        if 2 * width * height > _SIZE * _SIZE * shape[0] * shape[1]:
            chosen = shape
    return chosen


def tiles_of(pixels, columns, rows):
    """Return the tiles of uint8 pixels [H, W, 3], the thumbnail last."""
    large = _resize(pixels, _SIZE * columns, _SIZE * rows)
    tiles = [
        large[_SIZE * (n // columns) : _SIZE * (n // columns + 1),
              _SIZE * (n % columns) : _SIZE * (n % columns + 1)]
        for n in range(columns * rows)
    ]  # fmt: skip
    if len(tiles) > 1:
        tiles.append(_resize(pixels, _SIZE, _SIZE))
    return np.stack(tiles)


def _resize(pixels, width, height):
    height_in, width_in, _ = pixels.shape
    if width_in != width:
        across = pixels.transpose(1, 0, 2).reshape(width_in, -1)
        pixels = _filter(across, width).reshape(width, height_in, 3).transpose(1, 0, 2)
    if height_in != height:
        pixels = _filter(pixels.reshape(height_in, -1), height).reshape(height, -1, 3)
    return pixels


def _filter(lines, size):
    """Resample the first axis of uint8 lines [N, M]."""
    wide = _weights(len(lines), size) @ lines.astype(np.int32)
    rounded = (wide + (1 << (_FRACTION_BITS - 1))) >> _FRACTION_BITS
    return np.clip(rounded, 0, 255).astype(np.uint8)


@functools.lru_cache(maxsize=64)
def _weights(size_in, size_out):
    """Return the integer weights of bicubic filtering: a sparse matrix [out, in]."""
    scale = size_in / size_out
    stretch = max(scale, 1.0)
    values, columns, starts = [], [], [0]
    for position in range(size_out):
        centre = (position + 0.5) * scale
        low = max(0, int(centre - 2 * stretch + 0.5))
        high = min(size_in, int(centre + 2 * stretch + 0.5))
        row = [_cubic((k + low - centre + 0.5) / stretch) for k in range(high - low)]
        total = 0.0
        for value in row:
            total += value
        values += [_to_integer(value / total) for value in row]
        columns += range(low, high)
        starts.append(len(values))
    return scipy.sparse.csr_matrix(
        (np.array(values, np.int32), np.array(columns), np.array(starts)),
        shape=(size_out, size_in),
    )


def _to_integer(weight):
    return int(math.copysign(math.floor(abs(weight) * (1 << _FRACTION_BITS) + 0.5), weight))


def _cubic(x):
    a, x = -0.5, abs(x)
    if x < 1:
        return ((a + 2) * x - (a + 3)) * x * x + 1
    return (((x - 5) * x + 8) * x - 4) * a if x < 2 else 0.0
