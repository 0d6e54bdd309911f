"""From a chat request to a generation request: pictures, template, tokens, limits."""

import dataclasses
import uuid
from collections.abc import Iterator, Sequence

from internvl_runtime import errors, settings
from internvl_runtime.engine import interface
from internvl_runtime.model import config, conversation, prompt, tokenizer
from internvl_runtime.server import schemas
from internvl_runtime.vision import picture, sources

_ROLES = {
    "system": conversation.Role.SYSTEM,
    "developer": conversation.Role.SYSTEM,
    "user": conversation.Role.USER,
    "assistant": conversation.Role.ASSISTANT,
}


_MOST_CHARACTERS_PER_TOKEN = 128
"""The longest tokens of both vocabularies are runs of 128 spaces or shorter."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatPreparer:
    """Prepares requests for one loaded engine. Blocking: call it in a thread."""

    model: config.ModelConfig
    tokens: tokenizer.Tokenizer
    limits: interface.EngineLimits
    settings: settings.Settings

    def prepare(self, body: schemas.ChatCompletionRequest) -> interface.GenerationRequest:
        """Read the pictures, render and tokenize; raises RequestError for bad input."""
        self._check_text(body)
        pictures: list[picture.Picture] = []
        turns = [self._read_message(message, pictures) for message in body.messages]
        self._check_tiles(pictures)
        expanded = prompt.expand(
            conversation.render(turns, system_message=self.model.system_message),
            tiles=[opened.grid.tiles for opened in pictures],
            tokens=self.tokens,
        )
        return interface.GenerationRequest(
            request_id=interface.RequestId(f"chatcmpl-{uuid.uuid4().hex}"),
            prompt=expanded,
            images=pictures,
            sampling=self._sampling(body, prompt_tokens=len(expanded.token_ids)),
            stop_token_ids=self.tokens.stop_ids,
        )

    def _read_message(
        self, message: schemas.Message, pictures: list[picture.Picture]
    ) -> conversation.Turn:
        content = message.content or ""
        parts = (content,) if isinstance(content, str) else tuple(self._read(content, pictures))
        return conversation.Turn(_ROLES[message.role], conversation.place_images(parts))

    def _read(
        self, content: Sequence[schemas.ContentPart], pictures: list[picture.Picture]
    ) -> Iterator[str | conversation.Image]:
        for part in content:
            match part:
                case schemas.TextPart():
                    yield part.text
                case schemas.ImagePart():
                    pictures.append(self._open(part.image_url.url))
                    yield conversation.Image(len(pictures) - 1)

    def _open(self, url: str) -> picture.Picture:
        data = sources.read_url(url, max_bytes=self.settings.max_image_bytes)
        return picture.open_picture(
            data,
            max_tiles=self.limits.max_tiles_per_image,
            max_pixels=self.settings.max_image_pixels,
        )

    def _check_text(self, body: schemas.ChatCompletionRequest) -> None:
        """Refuse text that can not fit before it costs memory to tokenize it."""
        characters = sum(_count_characters(message) for message in body.messages)
        most = self.limits.max_input_tokens * _MOST_CHARACTERS_PER_TOKEN
        if characters > most:
            raise errors.RequestError(
                f"the messages have {characters} characters; more than {most} can not fit into "
                f"{self.limits.max_input_tokens} tokens: shorten them",
                parameter="messages",
                code="context_length_exceeded",
            )

    def _check_tiles(self, pictures: Sequence[picture.Picture]) -> None:
        tiles = sum(opened.grid.tiles for opened in pictures)
        if tiles > self.limits.max_tiles_per_request:
            raise errors.RequestError(
                f"the pictures make {tiles} tiles; at most {self.limits.max_tiles_per_request} "
                "are accepted in a request: send fewer or smaller pictures",
                parameter="messages",
                code="too_many_tiles",
            )

    def _sampling(
        self, body: schemas.ChatCompletionRequest, *, prompt_tokens: int
    ) -> interface.Sampling:
        room = self.limits.max_sequence_tokens - prompt_tokens
        wanted = body.max_completion_tokens or body.max_tokens
        if prompt_tokens > self.limits.max_input_tokens or room < 1:
            raise errors.RequestError(
                f"the prompt has {prompt_tokens} tokens; at most {self.limits.max_input_tokens} "
                f"are accepted, and {self.limits.max_sequence_tokens} with the answer: shorten "
                "it or send fewer pictures",
                parameter="messages",
                code="context_length_exceeded",
            )
        if wanted is not None and wanted > room:
            raise errors.RequestError(
                f"max_tokens is {wanted}, but {prompt_tokens} prompt tokens leave room for {room} "
                f"of {self.limits.max_sequence_tokens}: ask for at most {room}",
                parameter="max_tokens",
                code="context_length_exceeded",
            )
        return interface.Sampling(
            max_tokens=wanted or room,
            temperature=1.0 if body.temperature is None else body.temperature,
            top_p=body.top_p or 1.0,
            seed=body.seed,
        )


def _count_characters(message: schemas.Message) -> int:
    if message.content is None or isinstance(message.content, str):
        return len(message.content or "")
    return sum(len(part.text) for part in message.content if isinstance(part, schemas.TextPart))
