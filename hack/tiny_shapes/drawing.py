"""Draws many scenes at once with torch, and labels what their image tokens show."""

import dataclasses
import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812

from tiny_shapes import questions, scenes

SHAPES = list(scenes.Shape)
COLOURS = list(scenes.COLOURS)
_CELLS = 16
"""Image tokens of a tile, in each direction."""


def draw_tiles(pictures: Sequence[scenes.Scene], device: str) -> torch.Tensor:
    """Return the tiles of pictures of one grid, thumbnails last: uint8 [N, 448, 448, 3]."""
    if not pictures:
        return torch.empty(0)
    columns, rows = pictures[0].columns, pictures[0].rows
    pixels = _draw_pictures(pictures, device)
    count, size = len(pictures), scenes.TILE
    cut = pixels.view(count, rows, size, columns, size, 3).transpose(2, 3)
    tiles = cut.reshape(count, rows * columns, size, size, 3)
    if rows * columns > 1:
        planes = pixels.permute(0, 3, 1, 2)
        small = F.interpolate(planes, (size, size), mode="bicubic", antialias=True)
        tiles = torch.cat([tiles, small.permute(0, 2, 3, 1).unsqueeze(1)], dim=1)
    noise = 6 * torch.rand(tiles.shape, device=device) - 3
    return (tiles + noise).clamp(0, 255).round().to(torch.uint8).flatten(0, 1)


@dataclasses.dataclass(frozen=True)
class _Marks:
    """Every mark of some pictures, as tensors [M]."""

    picture: torch.Tensor
    x: torch.Tensor
    y: torch.Tensor
    radius: torch.Tensor
    shape: torch.Tensor
    colour: torch.Tensor
    is_hidden: torch.Tensor


def _marks_of(pictures: Sequence[scenes.Scene], device: str) -> _Marks:
    rows = [
        (number, mark.x, mark.y, mark.radius, SHAPES.index(mark.shape),
         COLOURS.index(mark.colour), mark.is_hidden)
        for number, scene in enumerate(pictures)
        for mark in scene.marks
    ]  # fmt: skip
    values = torch.tensor(rows, dtype=torch.float32).to(device).unbind(1)
    return _Marks(
        values[0].long(), values[1], values[2], values[3], values[4].long(), values[5].long(),
        values[6].bool(),
    )  # fmt: skip


def _draw_pictures(pictures: Sequence[scenes.Scene], device: str) -> torch.Tensor:
    """Return float pixels [N, height, width, 3]."""
    width, height, count = pictures[0].width, pictures[0].height, len(pictures)
    grounds = torch.tensor([float(scene.ground) for scene in pictures]).to(device)
    # One row more than there are pixels takes what lies outside of a mark.
    pixels = grounds.repeat_interleave(height * width).unsqueeze(1).repeat(1, 3)
    pixels = torch.cat([pixels, pixels[:1]])
    marks = _marks_of(pictures, device)
    reach = int(1.8 * max(mark.radius for scene in pictures for mark in scene.marks)) + 2
    window = torch.arange(-reach, reach, device=device)
    x = (marks.x.long().unsqueeze(1) + window).unsqueeze(1)
    y = (marks.y.long().unsqueeze(1) + window).unsqueeze(2)
    left = (x + 0.5 - marks.x.view(-1, 1, 1)) / marks.radius.view(-1, 1, 1)
    top = (y + 0.5 - marks.y.view(-1, 1, 1)) / marks.radius.view(-1, 1, 1)
    every = torch.stack([scenes.covers(shape, left, top) for shape in SHAPES])
    inside = every.gather(0, marks.shape.view(1, -1, 1, 1).expand(1, *every.shape[1:]))[0]
    is_disc = marks.is_hidden.view(-1, 1, 1) & (left * left + top * top < scenes.DISC**2)
    is_there = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    index = (marks.picture.view(-1, 1, 1) * height + y) * width + x
    index = torch.where((inside | is_disc) & is_there, index, count * height * width)
    colours = torch.tensor(list(scenes.COLOURS.values()), dtype=torch.float32).to(device)
    chequer = scenes.CHEQUER * (1 - 2 * ((x + y) % 2)) * ~inside
    pixels[index] = colours[marks.colour].view(-1, 1, 1, 3) + chequer.unsqueeze(-1)
    return pixels[:-1].view(count, height, width, 3)


def label_cells(pictures: Sequence[scenes.Scene], device: str) -> torch.Tensor:
    """Return what covers each image token of the grid's tiles: [N, tiles, 256, 2].

    Shape and colour, from 1; 0 where there is nothing.
    """
    columns, rows, cells = pictures[0].columns, pictures[0].rows, _CELLS
    side = scenes.TILE / cells
    x = (torch.arange(columns * cells, device=device) + 0.5) * side
    y = (torch.arange(rows * cells, device=device) + 0.5) * side
    marks = _marks_of(pictures, device)
    near = _near(marks.radius).unsqueeze(1)
    hit = ((x - marks.x.unsqueeze(1)).abs() < near).unsqueeze(1) & (
        (y - marks.y.unsqueeze(1)).abs() < near
    ).unsqueeze(2)
    labels = torch.zeros(len(pictures), len(y), len(x), 2, dtype=torch.long, device=device)
    what = torch.stack([marks.shape, marks.colour], dim=1) + 1
    for picture, here, mark in zip(marks.picture.tolist(), hit, what, strict=True):
        labels[picture] = torch.where(here.unsqueeze(-1), mark, labels[picture])
    cut = labels.view(len(pictures), rows, cells, columns, cells, 2).transpose(2, 3)
    return cut.reshape(len(pictures), rows * columns, cells * cells, 2)


def label_places(asked: Sequence[questions.Question], device: str) -> torch.Tensor:
    """Return where each image token lies: [image tokens, 4].

    1 or 0 for: right half, lower half, thumbnail, second picture.
    """
    pictures = [
        (scene, number) for question in asked for number, scene in enumerate(question.pictures)
    ]
    if not pictures:
        return torch.empty(0, 4, device=device)
    places = _places(pictures[0][0].columns, pictures[0][0].rows)
    numbers = torch.tensor([float(number) for _, number in pictures]).view(-1, 1, 1)
    every = places.unsqueeze(0).expand(len(pictures), -1, -1)
    labelled = torch.cat([every, numbers.expand(-1, len(places), 1)], dim=2)
    return labelled.flatten(0, 1).to(device)


def label_subjects(asked: Sequence[questions.Question], device: str) -> torch.Tensor:
    """Return which image tokens show what a question is about: bool [image tokens].

    Those of a thumbnail do not: small marks have no shape there.
    """
    pictures = [
        (scene, question.about[1] if question.about and question.about[0] == number else None)
        for question in asked
        for number, scene in enumerate(question.pictures)
    ]
    if not pictures:
        return torch.empty(0, dtype=torch.bool, device=device)
    centres = _centres(pictures[0][0].columns, pictures[0][0].rows).to(device)
    marks = torch.tensor(
        [(mark.x, mark.y, mark.radius) if mark else (-1e6, -1e6, 0.0) for _, mark in pictures]
    ).to(device)
    near = _near(marks[:, 2]).view(-1, 1, 1)
    hit = ((centres.unsqueeze(0) - marks[:, :2].unsqueeze(1)).abs() < near).all(2)
    return hit.flatten()


def _near(radius: torch.Tensor) -> torch.Tensor:
    """Return how far from a mark's centre, in x and y, a cell's centre counts as covered."""
    return (radius * 1.2).clamp(min=0.75 * scenes.TILE / _CELLS)


@functools.cache
def _centres(columns: int, rows: int) -> torch.Tensor:
    """Return the centres of a picture's cells [tiles * 256, 2], far outside for a thumbnail's."""
    cells = (torch.arange(_CELLS) + 0.5) * scenes.TILE / _CELLS
    down, across = torch.meshgrid(cells, cells, indexing="ij")
    one = torch.stack([across, down], dim=2).flatten(0, 1)
    tiles = [
        one + torch.tensor([column * scenes.TILE, row * scenes.TILE])
        for row in range(rows)
        for column in range(columns)
    ]
    if len(tiles) > 1:
        tiles.append(torch.full_like(one, 1e6))
    return torch.cat(tiles)


def halves_of_one_tile(device: str | torch.device) -> torch.Tensor:
    """Return whether each cell of a tile lies right and below: [256, 2]."""
    return _places(1, 1)[:, :2].to(device)


@functools.cache
def _places(columns: int, rows: int) -> torch.Tensor:
    """Return for a picture's image tokens: right half, lower half, thumbnail: [..., 3]."""
    grids = [(column, row, columns, rows) for row in range(rows) for column in range(columns)]
    tiles = [_places_of_tile(*tile, thumbnail=0.0) for tile in grids]
    if len(grids) > 1:
        tiles.append(_places_of_tile(0, 0, 1, 1, thumbnail=1.0))
    return torch.cat(tiles)


def _places_of_tile(
    column: int, row: int, columns: int, rows: int, *, thumbnail: float
) -> torch.Tensor:
    cells = torch.arange(_CELLS) + 0.5
    right = (column * _CELLS + cells) > columns * _CELLS / 2
    below = (row * _CELLS + cells) > rows * _CELLS / 2
    down, across = torch.meshgrid(below.float(), right.float(), indexing="ij")
    return torch.stack([across, down, torch.full_like(down, thumbnail)], dim=2).flatten(0, 1)
