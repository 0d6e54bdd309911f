"""Questions of tiny-shapes as OpenAI requests, and their controls."""

import dataclasses
import random

import pictures
import PIL.Image
from internvl_runtime.model import conversation
from tiny_shapes import questions, scenes

KINDS = {
    questions.Kind.ONE_MARK: 2, questions.Kind.CORNER: 4, questions.Kind.OTHER_CORNER: 2,
    questions.Kind.COLOURED_CORNER: 1, questions.Kind.WHERE: 1, questions.Kind.WHICH_IMAGE: 3,
    questions.Kind.WHICH_COLOUR: 1, questions.Kind.SECOND_IMAGE: 2,
    questions.Kind.COLOUR_OF_IT: 2, questions.Kind.SYSTEM: 1, questions.Kind.TEXT: 1,
}  # fmt: skip
"""How often each kind is asked."""

_TWO_PICTURES = {
    questions.Kind.WHICH_IMAGE, questions.Kind.WHICH_COLOUR, questions.Kind.SECOND_IMAGE,
}  # fmt: skip


def fresh(count, *, seed, kinds=KINDS, grids=questions.GRIDS):
    """Yield questions about pictures that nobody has seen before."""
    rng = random.Random(f"fresh/{seed}")
    for _ in range(count):
        (kind,) = rng.choices(list(kinds), list(kinds.values()))
        grid = (1, 1) if kind in _TWO_PICTURES else rng.choice(grids)
        yield questions.ask(kind, rng, grid)


def messages_of(question):
    """Return the messages of a question, its pictures as data URLs."""
    return [
        {"role": turn.role.value, "content": [_part(part, question) for part in turn.content]}
        if len(turn.content) > 1
        else {"role": turn.role.value, "content": turn.content[0]}
        for turn in with_words(question).turns
    ]


def with_words(question):
    """Write every picture's place as `<image>`, its part behind the text."""

    def write(turn):
        images = [part for part in turn.content if isinstance(part, conversation.Image)]
        text = "".join(part if isinstance(part, str) else "<image>" for part in turn.content)
        return dataclasses.replace(turn, content=(text, *images))

    return dataclasses.replace(question, turns=tuple(map(write, question.turns)))


def blank(question):
    """Return the question about pictures without any mark."""
    empty = tuple(dataclasses.replace(scene, marks=()) for scene in question.pictures)
    return dataclasses.replace(question, pictures=empty)


def swapped(question):
    """Return the question with its pictures in the other order."""
    return dataclasses.replace(question, pictures=question.pictures[::-1])


def without_earlier_turns(question):
    """Return the last turn alone."""
    return dataclasses.replace(question, turns=question.turns[-1:])


def with_earlier_turns_of(question, other):
    """Return the last turn behind the earlier turns, and their picture, of another question."""
    turns = (*other.turns[:-1], question.turns[-1])
    return dataclasses.replace(question, turns=turns, pictures=other.pictures)


def _part(part, question):
    if isinstance(part, str):
        return {"type": "text", "text": part}
    return pictures.image_part(PIL.Image.fromarray(scenes.draw(question.pictures[part.index])))
