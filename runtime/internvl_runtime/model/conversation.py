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
class Video:
    """The place of one video: its frames are pictures of the request."""

    frames: tuple[Image, ...]


Part = str | Image | Video


@dataclasses.dataclass(frozen=True)
class Turn:
    """One message: text, pictures and videos in the order in which they were sent."""

    role: Role
    content: tuple[Part, ...]


Segment = str | Control | Image


def place_images(turns: Sequence[Turn]) -> list[Turn]:
    """Give the pictures of a conversation their places in its text.

    `<image>` placeholders in the text of system and user take the pictures in
    order, over the whole conversation. Where there are none, a picture stands
    where its part stands, on a line of its own, as in the model card
    (`<image>\\n{question}`). A video stands where its part stands either way.

    Raises RequestError when placeholders and pictures differ in number.
    """
    images = [part for turn in turns for part in turn.content if isinstance(part, Image)]
    placeholders = sum(map(_count_placeholders, turns))
    if not placeholders:
        return [dataclasses.replace(t, content=tuple(_on_own_lines(t.content))) for t in turns]
    if placeholders != len(images):
        raise errors.RequestError(
            f"the text has {placeholders} {PLACEHOLDER} placeholders but the request has "
            f"{len(images)} pictures; write one placeholder for each picture, or none at all",
            parameter="messages",
        )
    upcoming = iter(images)
    return [
        dataclasses.replace(turn, content=tuple(_fill_placeholders(turn, upcoming)))
        for turn in turns
    ]


def render(turns: Sequence[Turn], *, system_message: str | None = None) -> Iterator[Segment]:
    """Yield the prompt of a conversation, up to where the assistant's answer begins."""
    turns = list(turns)
    if not turns or turns[0].role is not Role.SYSTEM:
        default = SYSTEM_MESSAGE if system_message is None else system_message
        turns.insert(0, Turn(Role.SYSTEM, (default,)))
    for turn in turns:
        yield Control.TURN_START
        yield f"{turn.role.value}\n"
        if turn.role is not Role.SYSTEM and not any(turn.content):
            # As in the authors' code: a message without content is its header alone.
            continue
        for part in turn.content:
            yield from _lines_of_frames(part) if isinstance(part, Video) else [part]
        yield Control.TURN_END
        yield "\n"
    yield Control.TURN_START
    yield f"{Role.ASSISTANT.value}\n"


def _takes_placeholders(turn: Turn) -> bool:
    """An answer of the model may hold the word `<image>`, and is sent back as it is."""
    return turn.role is not Role.ASSISTANT


def _count_placeholders(turn: Turn) -> int:
    if not _takes_placeholders(turn):
        return 0
    return sum(part.count(PLACEHOLDER) for part in turn.content if isinstance(part, str))


def _fill_placeholders(turn: Turn, images: Iterator[Image]) -> Iterator[Part]:
    for part in turn.content:
        match part:
            case str() if _takes_placeholders(turn):
                first, *others = part.split(PLACEHOLDER)
                yield first
                for piece in others:
                    yield next(images)
                    yield piece
            case str() | Video():
                yield part


def _on_own_lines(parts: Sequence[Part]) -> Iterator[Part]:
    previous: Part | None = None
    for part in parts:
        is_joined = isinstance(previous, str) and isinstance(part, str)
        if previous is not None and not is_joined and not isinstance(previous, Video):
            yield "\n"
        yield part
        previous = part


def _lines_of_frames(video: Video) -> Iterator[str | Image]:
    """Yield the model card's prefix of a video: `Frame1: <image>\\n` and so on."""
    for number, frame in enumerate(video.frames, start=1):
        yield f"Frame{number}: "
        yield frame
        yield "\n"
