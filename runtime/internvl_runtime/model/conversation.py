"""The `internvl2_5` conversation template.

Source: `conversation.py` of https://github.com/OpenGVLab/InternVL. The
template is written here and never taken from a repository's `chat_template`,
which is another one for the Qwen family.
"""

import dataclasses
import enum
from collections.abc import Iterator, Sequence

from internvl_runtime import errors

SYSTEM_MESSAGE = (
    "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位"
    "联合开发的多模态大语言模型。"
)
PLACEHOLDER = "<image>"


class Control(enum.StrEnum):
    """Tokens that only the template writes; the same words in a user's text stay text."""

    TURN_START = "<|im_start|>"
    TURN_END = "<|im_end|>"
    IMAGE_START = "<img>"
    IMAGE_END = "</img>"
    IMAGE_CONTEXT = "<IMG_CONTEXT>"


class Role(enum.StrEnum):
    """Who speaks in a turn."""

    SYSTEM = "system"
    USER = "user"
    ASSISTANT = "assistant"


@dataclasses.dataclass(frozen=True)
class Image:
    """The place of one picture, by its index in the request."""

    index: int


@dataclasses.dataclass(frozen=True)
class Turn:
    """One message: text in which pictures have their places."""

    role: Role
    content: tuple[str | Image, ...]


Segment = str | Control | Image


def place_images(parts: Sequence[str | Image]) -> tuple[str | Image, ...]:
    """Give the pictures of one message their places in its text.

    `<image>` placeholders in the text take the pictures in order. Where there
    are none, a picture stands where its part stands, on a line of its own, as
    in the model card (`<image>\\n{question}`).

    Raises RequestError when placeholders and pictures differ in number.
    """
    images = [part for part in parts if isinstance(part, Image)]
    placeholders = sum(part.count(PLACEHOLDER) for part in parts if isinstance(part, str))
    if placeholders and images:
        if placeholders != len(images):
            raise errors.RequestError(
                f"the text has {placeholders} {PLACEHOLDER} placeholders but the message has "
                f"{len(images)} pictures; write one for each picture, or none at all",
                parameter="messages",
            )
        return tuple(_fill_placeholders(parts, iter(images)))
    return tuple(_on_own_lines(parts))


def render(turns: Sequence[Turn], *, system_message: str | None = None) -> Iterator[Segment]:
    """Yield the prompt of a conversation, up to where the assistant's answer begins."""
    turns = list(turns)
    if not turns or turns[0].role is not Role.SYSTEM:
        turns.insert(0, Turn(Role.SYSTEM, (system_message or SYSTEM_MESSAGE,)))
    for turn in turns:
        yield Control.TURN_START
        yield f"{turn.role.value}\n"
        yield from turn.content
        yield Control.TURN_END
        yield "\n"
    yield Control.TURN_START
    yield f"{Role.ASSISTANT.value}\n"


def _fill_placeholders(
    parts: Sequence[str | Image], images: Iterator[Image]
) -> Iterator[str | Image]:
    for text in (part for part in parts if isinstance(part, str)):
        first, *others = text.split(PLACEHOLDER)
        yield first
        for piece in others:
            yield next(images)
            yield piece


def _on_own_lines(parts: Sequence[str | Image]) -> Iterator[str | Image]:
    for position, part in enumerate(parts):
        follows_image = position > 0 and isinstance(parts[position - 1], Image)
        if position > 0 and (follows_image or isinstance(part, Image)):
            yield "\n"
        yield part
