"""From request bodies to generation requests: template, tokens, limits."""

import dataclasses
import uuid
from collections.abc import Sequence
from typing import Any

from internvl_runtime import errors, settings
from internvl_runtime.engine import interface
from internvl_runtime.model import config, conversation, prompt, tokenizer
from internvl_runtime.server import media, sampling, schemas
from internvl_runtime.vision import fetch

_MOST_CHARACTERS_PER_TOKEN = 128
"""The longest tokens of both vocabularies are runs of 128 spaces or shorter."""
_COMPLETION_TOKENS = 16
"""OpenAI's default for completions."""

Requests = list[interface.GenerationRequest]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preparer:
    """Prepares requests for one loaded engine. Blocking: call it in a thread."""

    model: config.ModelConfig
    tokens: tokenizer.Tokenizer
    limits: interface.EngineLimits
    loader: media.Loader
    max_messages: int
    parses_special_tokens: bool
    """Whether words such as `<|im_end|>` in a user's text become tokens, as the authors do it."""

    def prepare_chat(self, body: schemas.ChatCompletionRequest, fetched: media.Fetched) -> Requests:
        """Return `n` requests; raises RequestError for bad input."""
        sampling.check_capabilities(body, self.limits)
        expanded, pictures = self.expand_chat(body.messages, fetched)
        wanted = body.max_completion_tokens or body.max_tokens
        return self._requests(
            body, [expanded], pictures, wanted=wanted, default=None, prefix="chatcmpl"
        )

    def prepare_completion(self, body: schemas.CompletionRequest) -> Requests:
        """Return `n` requests for each prompt; raises RequestError for bad input."""
        sampling.check_capabilities(body, self.limits)
        given = _prompts(body)
        if len(given) * (body.n or 1) > schemas.MOST_ANSWERS:
            raise errors.RequestError(
                f"{len(given)} prompts with n {body.n or 1} make more than "
                f"{schemas.MOST_ANSWERS} answers; send fewer in a request",
                parameter="prompt",
            )
        prompts = [self.expand_text(one) for one in given]
        return self._requests(
            body, prompts, [], wanted=body.max_tokens, default=_COMPLETION_TOKENS, prefix="cmpl"
        )

    def expand_chat(
        self, messages: Sequence[schemas.Message], fetched: media.Fetched
    ) -> tuple[prompt.Prompt, list[media.Opened]]:
        """Render and tokenize a conversation."""
        if len(messages) > self.max_messages:
            raise errors.RequestError(
                f"there are {len(messages)} messages, at most {self.max_messages} are accepted; "
                "shorten the conversation",
                parameter="messages",
            )
        self._check_length(sum(map(_count_characters, messages)), parameter="messages")
        turns, pictures = self.loader.read(messages, fetched)
        placed = conversation.place_images(turns)
        expanded = prompt.expand(
            conversation.render(placed, system_message=self.model.system_message),
            tiles=[opened.grid.tiles for opened in pictures],
            tokens=self.tokens,
            encode=self._encode,
        )
        return expanded, pictures

    def expand_text(
        self, text: str | Sequence[int], *, add_special_tokens: bool = True
    ) -> prompt.Prompt:
        """Tokenize a plain prompt, or check token ids; raises RequestError for an empty one."""
        if isinstance(text, str):
            self._check_length(len(text), parameter="prompt")
            prefix = self.tokens.prefix_ids if add_special_tokens else ()
            token_ids = (*prefix, *self._encode(text))
        else:
            token_ids = tuple(text)
            for token_id in token_ids:
                sampling.check_token_id(
                    token_id, self.model.language.vocab_size, parameter="prompt"
                )
        return prompt.Prompt(token_ids, ())

    def _requests(
        self,
        body: sampling.Fields,
        prompts: Sequence[prompt.Prompt],
        pictures: list[media.Opened],
        *,
        wanted: int | None,
        default: int | None,
        prefix: str,
    ) -> Requests:
        parameter = "messages" if isinstance(body, schemas.ChatCompletionRequest) else "prompt"
        identity = f"{prefix}-{uuid.uuid4().hex}"
        answers = body.n or 1
        constraint = sampling.constraint_of(body)
        requests: Requests = []
        for expanded in prompts:
            if not expanded.token_ids:
                raise errors.RequestError(
                    "the prompt is empty; write something", parameter=parameter
                )
            room = sampling.room_for(
                prompt_tokens=len(expanded.token_ids),
                wanted=wanted,
                default=default,
                limits=self.limits,
                parameter=parameter,
            )
            requests += [
                interface.GenerationRequest(
                    request_id=interface.RequestId(f"{identity}/{len(requests) + number}"),
                    prompt=expanded,
                    images=pictures,
                    sampling=sampling.sampling_of(
                        body,
                        max_tokens=room,
                        vocab_size=self.model.language.vocab_size,
                        answer_index=number,
                    ),
                    stop_token_ids=frozenset() if body.ignore_eos else self.tokens.stop_ids,
                    constraint=constraint,
                    priority=body.priority or 0,
                )
                for number in range(answers)
            ]
        return requests

    def _encode(self, text: str) -> list[int]:
        if self.parses_special_tokens:
            return tokenizer.encode_with_special_tokens(self.tokens, text)
        return self.tokens.encode(text)

    def _check_length(self, characters: int, *, parameter: str) -> None:
        """Refuse text that can not fit before it costs memory to tokenize it."""
        most = self.limits.max_input_tokens * _MOST_CHARACTERS_PER_TOKEN
        if characters > most:
            raise errors.RequestError(
                f"there are {characters} characters; more than {most} can not fit into "
                f"{self.limits.max_input_tokens} tokens: shorten the text",
                parameter=parameter,
                code="context_length_exceeded",
            )


def create_preparer(
    *,
    model: config.ModelConfig,
    tokens: tokenizer.Tokenizer,
    limits: interface.EngineLimits,
    fetcher: fetch.Fetcher,
    config_: settings.Settings,
) -> Preparer:
    """Return what prepares requests under the settings' bounds."""
    return Preparer(
        model=model,
        tokens=tokens,
        limits=limits,
        loader=media.Loader(fetcher, limits=limits, settings=config_),
        max_messages=config_.max_messages,
        parses_special_tokens=config_.parse_special_tokens,
    )


def _prompts(body: schemas.CompletionRequest) -> Sequence[str | Sequence[int]]:
    given: Any = body.prompt
    is_one = isinstance(given, str) or isinstance(next(iter(given), None), int)
    prompts: Sequence[str | Sequence[int]] = [given] if is_one else given
    if not prompts:
        raise errors.RequestError("the prompt is empty; write something", parameter="prompt")
    return prompts


def _count_characters(message: schemas.Message) -> int:
    if isinstance(message.content, str):
        return len(message.content)
    return sum(len(part.text) for part in message.parts if isinstance(part, schemas.TextPart))
