import random

import pytest
import tile_oracle
from internvl_runtime.vision import grid

GOLDEN = [
    ((1, 1), (1, 1), 1),
    ((448, 448), (1, 1), 1),
    ((633, 633), (1, 1), 1),
    ((634, 634), (2, 2), 5),
    ((950, 950), (2, 2), 5),
    ((951, 951), (3, 3), 10),
    ((896, 1024), (3, 3), 10),
    ((640, 480), (4, 3), 13),
    ((1000, 747), (4, 3), 13),
    ((448, 384), (4, 3), 13),
    ((480, 640), (3, 4), 13),
    ((1920, 1200), (3, 2), 7),
    ((224, 384), (2, 3), 7),
    ((210, 360), (2, 3), 7),
    ((1120, 1920), (2, 3), 7),
    ((1280, 720), (4, 2), 9),
    ((1267, 634), (4, 2), 9),
    ((1080, 1920), (2, 4), 9),
    ((889, 500), (2, 1), 3),
    ((360, 640), (1, 2), 3),
    ((5000, 100), (12, 1), 13),
    ((100, 5000), (1, 12), 13),
]


@pytest.mark.parametrize(("size", "expected", "tiles"), GOLDEN, ids=str)
def test_the_grid_is_that_of_the_authors_code(size, expected, tiles):
    chosen = grid.choose_grid(*size, max_tiles=12)

    assert (chosen.columns, chosen.rows) == expected
    assert chosen.tiles == tiles


def test_there_are_35_candidates_for_12_tiles():
    assert len(grid._candidates(12)) == 35


def test_one_tile_at_most_has_no_thumbnail():
    assert grid.choose_grid(4000, 100, max_tiles=1).tiles == 1


def test_10_000_random_sizes_get_the_oracles_grid():
    rng = random.Random(11)
    for _ in range(10_000):
        width, height = (round(8192 ** rng.random()) for _ in range(2))
        limit = rng.choice((12, 12, rng.randint(1, 40)))
        chosen = grid.choose_grid(width, height, max_tiles=limit)
        expected = tile_oracle.grid_of(width, height, limit)
        assert (chosen.columns, chosen.rows) == expected, (width, height, limit)
