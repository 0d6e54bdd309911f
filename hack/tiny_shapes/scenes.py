"""Pictures of coloured marks on a plain ground, drawn alike by numpy and by torch."""

import dataclasses
import enum
import random
from typing import Any

import numpy as np
import numpy.typing as npt
from internvl_runtime.model import config
from internvl_runtime.vision import grid

TILE = config.TILE_SIZE


class Shape(enum.StrEnum):
    """Outlines of equal area, so that a blurred mark does not tell its shape."""

    CIRCLE = "circle"
    SQUARE = "square"
    TRIANGLE = "triangle"
    CROSS = "cross"


class Place(enum.StrEnum):
    """Quarters of a picture; the value is how answers call them."""

    TOP_LEFT = "top left"
    TOP_RIGHT = "top right"
    BOTTOM_LEFT = "bottom left"
    BOTTOM_RIGHT = "bottom right"

    @property
    def column(self) -> int:
        """0 on the left, 1 on the right."""
        return int(self in {Place.TOP_RIGHT, Place.BOTTOM_RIGHT})

    @property
    def row(self) -> int:
        """0 at the top, 1 at the bottom."""
        return int(self in {Place.BOTTOM_LEFT, Place.BOTTOM_RIGHT})


class Layout(enum.StrEnum):
    """What a scene is made of."""

    ONE_LARGE_MARK = "one large mark"
    FOUR_ALIKE = "four small marks of one colour"
    FOUR_COLOURFUL = "four small marks of a colour each"


COLOURS = {
    "red": (205, 35, 35),
    "green": (35, 150, 45),
    "blue": (40, 50, 205),
    "yellow": (215, 195, 45),
}
"""Names and their RGB values."""

CHEQUER = 30
"""How far the pixels of a hidden mark's disc are from its colour."""
DISC = 1.75
"""Radius of that disc, in radii of the mark."""


@dataclasses.dataclass(frozen=True)
class Mark:
    """One shape; lengths are pixels of the picture."""

    shape: Shape
    colour: str
    x: float
    y: float
    radius: float
    """Radius of the circle of the same area."""
    is_hidden: bool = False
    """Whether the shape lies plain in a disc that is chequered pixel by pixel around the same
    colour: at half the size both are one."""


@dataclasses.dataclass(frozen=True)
class Scene:
    """A picture's content."""

    columns: int
    rows: int
    ground: int
    """Grey value of the background."""
    marks: tuple[Mark, ...]

    @property
    def width(self) -> int:
        """Pixels; a scene is as large as its tiles, so that no resampling moves a pixel."""
        return TILE * self.columns

    @property
    def height(self) -> int:
        """Pixels."""
        return TILE * self.rows

    @property
    def tiles(self) -> int:
        """Tiles of the model's grid, thumbnail included."""
        return grid.Grid(self.columns, self.rows).tiles

    def mark_at(self, place: Place) -> Mark:
        """Return the mark in a quarter of the picture."""
        return next(mark for mark in self.marks if self.place_of(mark) is place)

    def place_of(self, mark: Mark) -> Place:
        """Return the quarter in which a mark lies."""
        column, row = mark.x > self.width / 2, mark.y > self.height / 2
        return next(place for place in Place if (place.column, place.row) == (column, row))


def compose(layout: Layout, rng: random.Random, columns: int, rows: int) -> Scene:
    """Return a fresh scene for a picture of a grid."""
    marks = (
        (_one_large_mark(rng, columns, rows),)
        if layout is Layout.ONE_LARGE_MARK
        else _four_small_marks(rng, columns, rows, is_colourful=layout is Layout.FOUR_COLOURFUL)
    )
    return Scene(columns, rows, rng.randint(170, 255), marks)


def _one_large_mark(rng: random.Random, columns: int, rows: int) -> Mark:
    """Return a mark that lies in one quarter of the picture."""
    place = rng.choice(list(Place))
    radius = rng.uniform(22, 45)
    half_width, half_height = TILE * columns / 2, TILE * rows / 2
    margin = 1.6 * radius
    return Mark(
        shape=rng.choice(list(Shape)),
        colour=rng.choice(list(COLOURS)),
        x=half_width * place.column + rng.uniform(margin, half_width - margin),
        y=half_height * place.row + rng.uniform(margin, half_height - margin),
        radius=radius,
    )


def _four_small_marks(
    rng: random.Random, columns: int, rows: int, *, is_colourful: bool
) -> tuple[Mark, ...]:
    """Return a mark in each corner tile, or in each quarter where tiles are fewer.

    All have one area and, unless they are to be colourful, one colour: the
    thumbnail shows four dots alike. Each grid tile shows a shape, but not
    which corner of the picture it is. Colourful ones have a colour each.
    """
    colours = rng.sample(list(COLOURS), 4) if is_colourful else [rng.choice(list(COLOURS))] * 4
    radius = rng.uniform(14, 18)

    def within(tiles: int, half: int) -> float:
        """Return a coordinate in the first or last tile, or in a half of the only one."""
        size = TILE if tiles > 1 else TILE / 2
        return half * (tiles * TILE - size) + rng.uniform(2 * radius, size - 2 * radius)

    return tuple(
        Mark(
            shape=rng.choice(list(Shape)),
            colour=colour,
            x=within(columns, place.column),
            y=within(rows, place.row),
            radius=radius,
            is_hidden=True,
        )
        for place, colour in zip(Place, colours, strict=True)
    )


def draw(scene: Scene) -> npt.NDArray[np.uint8]:
    """Return the pixels [height, width, 3]."""
    x = np.arange(scene.width, dtype=np.float32)[np.newaxis, :] + 0.5
    y = np.arange(scene.height, dtype=np.float32)[:, np.newaxis] + 0.5
    pixels = np.full((scene.height, scene.width, 3), scene.ground, dtype=np.uint8)
    for mark in scene.marks:
        left, top = (x - mark.x) / mark.radius, (y - mark.y) / mark.radius
        if mark.is_hidden:
            # x + y is one more than the sum of the pixel's column and row.
            for odd, step in ((1, CHEQUER), (0, -CHEQUER)):
                disc = (left * left + top * top < DISC**2) & ((x + y) % 2 == odd)
                pixels[disc] = np.clip(np.array(COLOURS[mark.colour]) + step, 0, 255)
        inside = covers(mark.shape, left, top)
        pixels[inside] = COLOURS[mark.colour]
    return pixels


def covers(shape: Shape, x: Any, y: Any) -> Any:
    """Return where a shape of area pi around the origin lies; works on numpy and torch arrays."""
    match shape:
        case Shape.CIRCLE:
            return x * x + y * y < 1
        case Shape.SQUARE:
            return (abs(x) < 0.886) & (abs(y) < 0.886)  # noqa: PLR2004 - sqrt(pi) / 2
        case Shape.TRIANGLE:
            # Equilateral, circumradius 1.555: area 3 sqrt(3) / 4 R^2 = pi.
            return (y < 0.778) & (abs(x) * 1.732 < y + 1.555)  # noqa: PLR2004
        case Shape.CROSS:
            # Arms of length 1.189 and half width a third of it: area 20 / 9 L^2 = pi.
            long, wide = 1.189, 0.396
            return ((abs(x) < long) & (abs(y) < wide)) | ((abs(x) < wide) & (abs(y) < long))
