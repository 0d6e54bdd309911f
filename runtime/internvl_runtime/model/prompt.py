"""From template segments to prompt tokens, with the place of every picture."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence

from internvl_runtime.model import config, conversation, tokenizer


@dataclasses.dataclass(frozen=True)
class ImagePlacement:
    """Where one picture's features go in the prompt."""

    index: int
    """Index of the picture in the request."""
    offset: int
    """Position of its first `<IMG_CONTEXT>` token."""
    length: int
    """Number of `<IMG_CONTEXT>` tokens: 256 for each tile."""


@dataclasses.dataclass(frozen=True)
class Prompt:
    """Token ids of a prompt and its image placements, in order."""

    token_ids: tuple[int, ...]
    placements: tuple[ImagePlacement, ...]


def expand(
    segments: Iterable[conversation.Segment],
    *,
    tiles: Sequence[int],
    tokens: tokenizer.Tokenizer,
    encode: Callable[[str], list[int]] | None = None,
) -> Prompt:
    """Tokenize a rendered conversation; `tiles[i]` is the number of tiles of picture i.

    Text is encoded by `encode`, or as nothing but text where that is absent.
    """
    encode = encode or tokens.encode
    token_ids = list(tokens.prefix_ids)
    placements = []
    for segment in _join_texts(segments):
        match segment:
            case conversation.Control():
                token_ids.append(tokens.control_ids[segment])
            case conversation.Image(index):
                length = tiles[index] * config.TOKENS_PER_TILE
                token_ids.append(tokens.control_ids[conversation.Control.IMAGE_START])
                placements.append(ImagePlacement(index, len(token_ids), length))
                token_ids += [tokens.control_ids[conversation.Control.IMAGE_CONTEXT]] * length
                token_ids.append(tokens.control_ids[conversation.Control.IMAGE_END])
            case str():
                token_ids += encode(segment)
    return Prompt(tuple(token_ids), tuple(placements))


def _join_texts(
    segments: Iterable[conversation.Segment],
) -> Iterator[conversation.Segment]:
    """Join neighbouring texts: the reference tokenizes what lies between two control tokens."""
    text = ""
    for segment in segments:
        if isinstance(segment, str) and not isinstance(segment, conversation.Control):
            text += segment
            continue
        if text:
            yield text
        text = ""
        yield segment
    if text:
        yield text
