"""How many tiles a picture becomes.

Source: `dynamic_preprocess` of https://github.com/OpenGVLab/InternVL. Ratios
are IEEE doubles on purpose: single precision or exact fractions choose other
grids for some sizes.
"""

import dataclasses
import functools

from internvl_runtime.model import config


@dataclasses.dataclass(frozen=True)
class Grid:
    """Columns and rows of tiles."""

    columns: int
    rows: int

    @property
    def tiles(self) -> int:
        """Number of tiles, with the thumbnail that follows a grid of several."""
        area = self.columns * self.rows
        return area if area == 1 else area + 1


def choose_grid(width: int, height: int, *, max_tiles: int) -> Grid:
    """Choose the grid whose ratio is nearest to the picture's, of at most `max_tiles` tiles."""
    ratio = width / height
    best, best_difference = Grid(1, 1), float("inf")
    for grid in _candidates(max_tiles):
        difference = abs(ratio - grid.columns / grid.rows)
        if difference < best_difference:
            best, best_difference = grid, difference
        elif difference == best_difference and _is_large_enough(width * height, grid):
            best = grid
    return best


@functools.cache
def _candidates(max_tiles: int) -> tuple[Grid, ...]:
    grids = [
        Grid(columns, rows)
        for columns in range(1, max_tiles + 1)
        for rows in range(1, max_tiles // columns + 1)
    ]
    return tuple(sorted(grids, key=lambda grid: grid.columns * grid.rows))


def _is_large_enough(area: int, grid: Grid) -> bool:
    return area > 0.5 * config.TILE_SIZE**2 * grid.columns * grid.rows
