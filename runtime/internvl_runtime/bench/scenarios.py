"""What the load tool asks: conversations with pictures that no other request has."""

import base64
import dataclasses
import enum
import io
import random
from typing import Any

import numpy as np
import PIL.Image

Message = dict[str, Any]

_WORDS = (
    "time", "year", "people", "way", "day", "thing", "world", "life", "hand", "part", "child",
    "eye", "place", "work", "week", "case", "point", "company", "number", "group", "problem",
    "fact", "house", "water", "room", "mother", "area", "money", "story", "month", "book", "city",
)  # fmt: skip
_QUALITY = 90
"""Of the JPEG files; noise at this quality weighs about what a photograph does."""
_GRAIN = 16
"""Pixels of a grain of the noise."""


class Scenario(enum.StrEnum):
    """Kinds of load."""

    PICTURE = "picture"
    """One picture and a question."""
    TURNS = "turns"
    """The same, and a second question about it once it is answered."""
    TEXT = "text"
    MIXED = "mixed"
    """Two in three with a picture, the others text alone."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """How large requests are."""

    width: int
    height: int
    """Pixels of each picture."""
    words: int
    """Of each question: about as many tokens."""


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Questions of one user; each follows the answer to the one before."""

    questions: tuple[Message, ...]


def write_conversation(scenario: Scenario, shape: Shape, *, seed: int, number: int) -> Conversation:
    """Return conversation `number` of a run; another seed or number has other pictures."""
    rng = random.Random(f"{seed}/{number}")  # noqa: S311 - reproducible, no secret
    has_picture = scenario is not Scenario.TEXT
    if scenario is Scenario.MIXED:
        has_picture = number % 3 != 0
    text = " ".join(rng.choices(_WORDS, k=shape.words))
    content: Any = text
    if has_picture:
        content = [draw_picture(rng, shape), {"type": "text", "text": text}]
    questions = [{"role": "user", "content": content}]
    if scenario is Scenario.TURNS:
        again = " ".join(rng.choices(_WORDS, k=shape.words))
        questions.append({"role": "user", "content": again})
    return Conversation(tuple(questions))


def draw_picture(rng: random.Random, shape: Shape) -> Message:
    """Return an image part with a JPEG of coloured noise."""
    grains = np.random.default_rng(rng.getrandbits(64)).integers(
        0, 256, (-(-shape.height // _GRAIN), -(-shape.width // _GRAIN), 3), dtype=np.uint8
    )
    picture = PIL.Image.fromarray(grains).resize(
        (shape.width, shape.height), PIL.Image.Resampling.BICUBIC
    )
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=_QUALITY)
    encoded = base64.b64encode(file.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{encoded}"}}
