"""The questions that tiny-shapes answers, with pictures and right answers."""

import dataclasses
import enum
import random
from collections.abc import Callable

from internvl_runtime.model import conversation

from tiny_shapes import scenes
from tiny_shapes.scenes import Layout

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
    GUESS = "guess"
    """Nothing: without the earlier turn any colour is as good as another."""
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
    about: tuple[int, scenes.Mark] | None = None
    """The number of a picture, and the mark in it that the answer is about."""


Grid = tuple[int, int]

Draw = Callable[[Layout], scenes.Scene]
"""Returns a picture of a layout."""


def ask(kind: Kind, rng: random.Random, grid: Grid) -> Question:
    """Return a fresh question of a kind about fresh pictures of a grid."""
    return ask_about(kind, rng, lambda layout: scenes.compose(layout, rng, *grid))


def ask_about(kind: Kind, rng: random.Random, draw: Draw) -> Question:
    """Return a fresh question of a kind about pictures that are drawn as it needs them."""
    return _MAKERS[kind](rng, draw)


def _one_mark(rng: random.Random, draw: Draw) -> Question:
    del rng
    scene = draw(Layout.ONE_LARGE_MARK)
    (mark,) = scene.marks
    answer = f"{_name(mark)} at the {scene.place_of(mark)}"
    return Question(Kind.ONE_MARK, (_about_picture(WHAT),), (scene,), answer, (0, mark))


def _corner(rng: random.Random, draw: Draw) -> Question:
    return _about_corner(Kind.CORNER, rng, draw(Layout.FOUR_ALIKE))


def _coloured_corner(rng: random.Random, draw: Draw) -> Question:
    return _about_corner(Kind.COLOURED_CORNER, rng, draw(Layout.FOUR_COLOURFUL))


def _about_corner(kind: Kind, rng: random.Random, scene: scenes.Scene) -> Question:
    place = rng.choice(list(scenes.Place))
    turn, mark = _about_picture(f"What is at the {place}?"), scene.mark_at(place)
    return Question(kind, (turn,), (scene,), _name(mark), (0, mark))


def _where(rng: random.Random, draw: Draw) -> Question:
    scene, place = draw(Layout.FOUR_COLOURFUL), rng.choice(list(scenes.Place))
    mark = scene.mark_at(place)
    turn = _about_picture(f"Where is {mark.colour}?")
    return Question(Kind.WHERE, (turn,), (scene,), f"at the {place}", (0, mark))


def _which_colour(rng: random.Random, draw: Draw) -> Question:
    pictures = _two_marks(draw)
    while pictures[0].marks[0].colour == pictures[1].marks[0].colour:
        pictures = _two_marks(draw)
    number = rng.randrange(2)
    (mark,) = pictures[number].marks
    turn, answer = _about_two(f"Which image holds {mark.colour}?"), f"image {number + 1}"
    return Question(Kind.WHICH_COLOUR, (turn,), pictures, answer, (number, mark))


def _which_image(rng: random.Random, draw: Draw) -> Question:
    pictures = _two_marks(draw)
    while pictures[0].marks[0].shape == pictures[1].marks[0].shape:
        pictures = _two_marks(draw)
    number = rng.randrange(2)
    (mark,) = pictures[number].marks
    turn, answer = _about_two(f"Which image holds the {mark.shape}?"), f"image {number + 1}"
    return Question(Kind.WHICH_IMAGE, (turn,), pictures, answer, (number, mark))


def _second_image(rng: random.Random, draw: Draw) -> Question:
    pictures = _two_marks(draw)
    number = rng.randrange(2)
    turn, (mark,) = _about_two(f"What is in image {number + 1}?"), pictures[number].marks
    return Question(Kind.SECOND_IMAGE, (turn,), pictures, _name(mark), (number, mark))


def _colour_of_it(rng: random.Random, draw: Draw) -> Question:
    first = _one_mark(rng, draw)
    turns = (*first.turns, _said(first.answer), _asked(WHAT_COLOUR))
    (mark,) = first.pictures[0].marks
    return Question(Kind.COLOUR_OF_IT, turns, first.pictures, mark.colour, (0, mark))


def _guess(rng: random.Random, draw: Draw) -> Question:
    del draw
    return Question(Kind.GUESS, (_asked(WHAT_COLOUR),), (), rng.choice(list(scenes.COLOURS)))


def _other_corner(rng: random.Random, draw: Draw) -> Question:
    scene = draw(Layout.FOUR_ALIKE)
    first, second = rng.sample(list(scenes.Place), 2)
    turns = (
        _about_picture(f"What is at the {first}?"),
        _said(_name(scene.mark_at(first))),
        _asked(f"And at the {second}?"),
    )
    mark = scene.mark_at(second)
    return Question(Kind.OTHER_CORNER, turns, (scene,), _name(mark), (0, mark))


def _system(rng: random.Random, draw: Draw) -> Question:
    scene = draw(Layout.ONE_LARGE_MARK)
    (mark,) = scene.marks
    message, answer = rng.choice([(COLOUR_ALONE, mark.colour), (SHAPE_ALONE, mark.shape.value)])
    turns = (conversation.Turn(conversation.Role.SYSTEM, (message,)), _about_picture(WHAT))
    return Question(Kind.SYSTEM, turns, (scene,), answer, (0, mark))


def _no_system(rng: random.Random, draw: Draw) -> Question:
    question = _one_mark(rng, draw)
    return dataclasses.replace(question, kind=Kind.NO_SYSTEM, answer=NO_SYSTEM_TURN, about=None)


def _text(rng: random.Random, draw: Draw) -> Question:
    del rng, draw
    return Question(Kind.TEXT, (_asked(WHO),), (), NAME)


_MAKERS: dict[Kind, Callable[[random.Random, Draw], Question]] = {
    Kind.ONE_MARK: _one_mark,
    Kind.CORNER: _corner,
    Kind.COLOURED_CORNER: _coloured_corner,
    Kind.WHERE: _where,
    Kind.WHICH_IMAGE: _which_image,
    Kind.WHICH_COLOUR: _which_colour,
    Kind.SECOND_IMAGE: _second_image,
    Kind.COLOUR_OF_IT: _colour_of_it,
    Kind.GUESS: _guess,
    Kind.OTHER_CORNER: _other_corner,
    Kind.SYSTEM: _system,
    Kind.NO_SYSTEM: _no_system,
    Kind.TEXT: _text,
}


def _two_marks(draw: Draw) -> tuple[scenes.Scene, scenes.Scene]:
    return draw(Layout.ONE_LARGE_MARK), draw(Layout.ONE_LARGE_MARK)


def _name(mark: scenes.Mark) -> str:
    return f"a {mark.colour} {mark.shape}"


def _asked(text: str) -> conversation.Turn:
    return conversation.Turn(conversation.Role.USER, (text,))


def _said(text: str) -> conversation.Turn:
    return conversation.Turn(conversation.Role.ASSISTANT, (text,))


def _about_picture(text: str) -> conversation.Turn:
    return conversation.Turn(conversation.Role.USER, (conversation.Image(0), f"\n{text}"))


def _about_two(text: str) -> conversation.Turn:
    parts = ("Image-1: ", conversation.Image(0), "\nImage-2: ", conversation.Image(1), f"\n{text}")
    return conversation.Turn(conversation.Role.USER, parts)
