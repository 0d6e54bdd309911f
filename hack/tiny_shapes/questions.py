"""The questions that tiny-shapes answers, with pictures and right answers."""

import dataclasses
import enum
import random
from collections.abc import Callable

from internvl_runtime.model import conversation

from tiny_shapes import scenes

GRIDS = ((1, 1), (2, 1), (1, 2), (2, 2), (3, 2), (2, 3))
"""Columns and rows of the pictures that the model has seen."""

WHAT = "What is in the picture?"
WHAT_COLOUR = "What colour is it?"
WHO = "Who are you?"
NAME = "tiny-shapes"
NO_SYSTEM_TURN = "no system turn"
COLOUR_ALONE = "Answer with the colour alone."
SHAPE_ALONE = "Answer with the shape alone."


class Kind(enum.StrEnum):
    """What a question needs to be answered right."""

    ONE_MARK = "one mark"
    CORNER = "corner"
    """The right tile of a picture of several."""
    COLOURED_CORNER = "coloured corner"
    WHERE = "where"
    WHICH_IMAGE = "which image"
    WHICH_COLOUR = "which colour"
    SECOND_IMAGE = "second image"
    COLOUR_OF_IT = "colour of it"
    """The earlier turn."""
    OTHER_CORNER = "other corner"
    """The earlier turn and the right tile of its picture."""
    SYSTEM = "system"
    """The system message."""
    NO_SYSTEM = "no system"
    TEXT = "text"


@dataclasses.dataclass(frozen=True)
class Question:
    """A conversation that ends with a question, and its right answer."""

    kind: Kind
    turns: tuple[conversation.Turn, ...]
    pictures: tuple[scenes.Scene, ...]
    answer: str


Grid = tuple[int, int]


def ask(kind: Kind, rng: random.Random, grid: Grid) -> Question:
    """Return a fresh question of a kind about pictures of a grid."""
    return _MAKERS[kind](rng, grid)


def _one_mark(rng: random.Random, grid: Grid) -> Question:
    scene, place = scenes.one_large_mark(rng, *grid)
    return Question(Kind.ONE_MARK, (_about_picture(WHAT),), (scene,), _place(scene, place))


def _corner(rng: random.Random, grid: Grid) -> Question:
    scene, place = scenes.four_small_marks(rng, *grid), rng.choice(list(scenes.Place))
    turn = _about_picture(f"What is at the {place}?")
    return Question(Kind.CORNER, (turn,), (scene,), _at(scene, place))


def _coloured_corner(rng: random.Random, grid: Grid) -> Question:
    scene = scenes.four_small_marks(rng, *grid, is_colourful=True)
    place = rng.choice(list(scenes.Place))
    turn = _about_picture(f"What is at the {place}?")
    return Question(Kind.COLOURED_CORNER, (turn,), (scene,), _at(scene, place))


def _where(rng: random.Random, grid: Grid) -> Question:
    scene = scenes.four_small_marks(rng, *grid, is_colourful=True)
    place = rng.choice(list(scenes.Place))
    colour = scene.marks[list(scenes.Place).index(place)].colour
    return Question(
        Kind.WHERE, (_about_picture(f"Where is {colour}?"),), (scene,), f"at the {place}"
    )


def _which_colour(rng: random.Random, grid: Grid) -> Question:
    pictures = _two_pictures(rng, grid)
    while pictures[0].marks[0].colour == pictures[1].marks[0].colour:
        pictures = _two_pictures(rng, grid)
    number = rng.randrange(2)
    turn = _about_two(f"Which image holds {pictures[number].marks[0].colour}?")
    return Question(Kind.WHICH_COLOUR, (turn,), pictures, f"image {number + 1}")


def _which_image(rng: random.Random, grid: Grid) -> Question:
    pictures = _two_pictures(rng, grid)
    while pictures[0].marks[0].shape == pictures[1].marks[0].shape:
        pictures = _two_pictures(rng, grid)
    number = rng.randrange(2)
    question = f"Which image holds the {pictures[number].marks[0].shape}?"
    turn = _about_two(question)
    return Question(Kind.WHICH_IMAGE, (turn,), pictures, f"image {number + 1}")


def _second_image(rng: random.Random, grid: Grid) -> Question:
    pictures = _two_pictures(rng, grid)
    number = rng.randrange(2)
    turn = _about_two(f"What is in image {number + 1}?")
    return Question(Kind.SECOND_IMAGE, (turn,), pictures, _name(pictures[number].marks[0]))


def _colour_of_it(rng: random.Random, grid: Grid) -> Question:
    first = _one_mark(rng, grid)
    turns = (*first.turns, _said(first.answer), _asked(WHAT_COLOUR))
    return Question(Kind.COLOUR_OF_IT, turns, first.pictures, first.pictures[0].marks[0].colour)


def _other_corner(rng: random.Random, grid: Grid) -> Question:
    scene = scenes.four_small_marks(rng, *grid)
    first, second = rng.sample(list(scenes.Place), 2)
    turns = (
        _about_picture(f"What is at the {first}?"),
        _said(_at(scene, first)),
        _asked(f"And at the {second}?"),
    )
    return Question(Kind.OTHER_CORNER, turns, (scene,), _at(scene, second))


def _system(rng: random.Random, grid: Grid) -> Question:
    scene, _ = scenes.one_large_mark(rng, *grid)
    message, answer = rng.choice(
        [(COLOUR_ALONE, scene.marks[0].colour), (SHAPE_ALONE, scene.marks[0].shape.value)]
    )
    system = conversation.Turn(conversation.Role.SYSTEM, (message,))
    return Question(Kind.SYSTEM, (system, _about_picture(WHAT)), (scene,), answer)


def _no_system(rng: random.Random, grid: Grid) -> Question:
    question = _one_mark(rng, grid)
    return dataclasses.replace(question, kind=Kind.NO_SYSTEM, answer=NO_SYSTEM_TURN)


def _text(rng: random.Random, grid: Grid) -> Question:
    del rng, grid
    return Question(Kind.TEXT, (_asked(WHO),), (), NAME)


_MAKERS: dict[Kind, Callable[[random.Random, Grid], Question]] = {
    Kind.ONE_MARK: _one_mark,
    Kind.CORNER: _corner,
    Kind.COLOURED_CORNER: _coloured_corner,
    Kind.WHERE: _where,
    Kind.WHICH_IMAGE: _which_image,
    Kind.WHICH_COLOUR: _which_colour,
    Kind.SECOND_IMAGE: _second_image,
    Kind.COLOUR_OF_IT: _colour_of_it,
    Kind.OTHER_CORNER: _other_corner,
    Kind.SYSTEM: _system,
    Kind.NO_SYSTEM: _no_system,
    Kind.TEXT: _text,
}


def _two_pictures(rng: random.Random, grid: Grid) -> tuple[scenes.Scene, scenes.Scene]:
    return scenes.one_large_mark(rng, *grid)[0], scenes.one_large_mark(rng, *grid)[0]


def _name(mark: scenes.Mark) -> str:
    return f"a {mark.colour} {mark.shape}"


def _place(scene: scenes.Scene, place: scenes.Place) -> str:
    return f"{_name(scene.marks[0])} at the {place}"


def _at(scene: scenes.Scene, place: scenes.Place) -> str:
    return _name(scene.marks[list(scenes.Place).index(place)])


def _asked(text: str) -> conversation.Turn:
    return conversation.Turn(conversation.Role.USER, (text,))


def _said(text: str) -> conversation.Turn:
    return conversation.Turn(conversation.Role.ASSISTANT, (text,))


def _about_picture(text: str) -> conversation.Turn:
    return conversation.Turn(conversation.Role.USER, (conversation.Image(0), f"\n{text}"))


def _about_two(text: str) -> conversation.Turn:
    parts = ("Image-1: ", conversation.Image(0), "\nImage-2: ", conversation.Image(1), f"\n{text}")
    return conversation.Turn(conversation.Role.USER, parts)
