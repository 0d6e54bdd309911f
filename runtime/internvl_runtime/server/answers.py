"""How answers are written: OpenAI's response objects, whole and as chunks of a stream."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from internvl_runtime.engine import interface
from internvl_runtime.server import schemas

Json = dict[str, Any]
TokenBytes = Callable[[int], bytes]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Delta:
    """What one step adds to one answer."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    log_probabilities: tuple[interface.TokenLogProbabilities, ...] = ()
    finish_reason: str | None = None


class Format(Protocol):
    """What tells chat completions and completions apart."""

    @property
    def object_name(self) -> str:
        """Return the `object` of a whole response."""
        ...

    @property
    def chunk_name(self) -> str:
        """Return the `object` of a chunk."""
        ...

    def opening(self, index: int) -> Json | None:
        """Return the choice that begins a stream, where there is one."""
        ...

    def whole(self, index: int, deltas: Sequence[Delta]) -> Json:
        """Return a choice of a whole response."""
        ...

    def part(self, delta: Delta) -> Json:
        """Return a choice of a chunk."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatFormat:
    """`chat.completion` and its chunks."""

    token_bytes: TokenBytes
    object_name: str = "chat.completion"
    chunk_name: str = "chat.completion.chunk"

    def opening(self, index: int) -> Json | None:
        """Return the choice that names the role."""
        delta = {"role": "assistant", "content": "", "refusal": None}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def whole(self, index: int, deltas: Sequence[Delta]) -> Json:
        """Return a message."""
        text = "".join(delta.text for delta in deltas)
        return {
            "index": index,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": self._log_probabilities(deltas),
            "finish_reason": deltas[-1].finish_reason,
        }

    def part(self, delta: Delta) -> Json:
        """Return what a step adds to a message."""
        return {
            "index": delta.index,
            "delta": {"content": delta.text},
            "logprobs": self._log_probabilities([delta]),
            "finish_reason": delta.finish_reason,
        }

    def _log_probabilities(self, deltas: Sequence[Delta]) -> Json | None:
        content = [
            {
                **self._token(token_id, told.chosen),
                "top_logprobs": [self._token(*entry) for entry in told.top],
            }
            for delta in deltas
            for token_id, told in zip(delta.token_ids, delta.log_probabilities, strict=False)
        ]
        return {"content": content, "refusal": None} if content else None

    def _token(self, token_id: int, log_probability: float) -> Json:
        raw = self.token_bytes(token_id)
        return {
            "token": raw.decode("utf-8", "replace"),
            "logprob": log_probability,
            "bytes": list(raw),
        }


class CompletionFormat:
    """`text_completion`, whole and in chunks; offsets count the characters of the answer."""

    object_name = "text_completion"
    chunk_name = "text_completion"

    def __init__(self, token_bytes: TokenBytes) -> None:
        self._token_bytes = token_bytes
        self._offsets: dict[int, int] = {}

    def opening(self, index: int) -> Json | None:
        """Return nothing: a completion has no role."""
        del index
        return None

    def whole(self, index: int, deltas: Sequence[Delta]) -> Json:
        """Return a text."""
        return {
            "index": index,
            "text": "".join(delta.text for delta in deltas),
            "logprobs": self._log_probabilities(deltas),
            "finish_reason": deltas[-1].finish_reason,
        }

    def part(self, delta: Delta) -> Json:
        """Return what a step adds to a text."""
        return {
            "index": delta.index,
            "text": delta.text,
            "logprobs": self._log_probabilities([delta]),
            "finish_reason": delta.finish_reason,
        }

    def _log_probabilities(self, deltas: Sequence[Delta]) -> Json | None:
        told: Json = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for delta in deltas:
            for token_id, entry in zip(delta.token_ids, delta.log_probabilities, strict=False):
                text = self._text(token_id)
                offset = self._offsets.get(delta.index, 0)
                self._offsets[delta.index] = offset + len(text)
                told["tokens"].append(text)
                told["token_logprobs"].append(entry.chosen)
                told["top_logprobs"].append({self._text(i): value for i, value in entry.top})
                told["text_offset"].append(offset)
        return told if told["tokens"] else None

    def _text(self, token_id: int) -> str:
        return self._token_bytes(token_id).decode("utf-8", "replace")


def count_prompt_tokens(requests: Sequence[interface.GenerationRequest]) -> int:
    """Return the prompt tokens of a response; a prompt with several answers counts once."""
    prompts = {id(request.prompt): request.prompt for request in requests}
    return sum(len(prompt.token_ids) for prompt in prompts.values())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """The response to one HTTP request: its generation requests, and how it is written."""

    requests: Sequence[interface.GenerationRequest]
    model: str
    format: Format
    return_token_ids: bool
    stream_usage: bool
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    def completion(self, deltas: Sequence[Delta]) -> Json:
        """Return the body of an unstreamed response."""
        choices = []
        for index in range(len(self.requests)):
            own = [delta for delta in deltas if delta.index == index]
            token_ids = [token_id for delta in own for token_id in delta.token_ids]
            choices.append(self.format.whole(index, own) | self._token_ids(token_ids))
        completion_tokens = sum(len(delta.token_ids) for delta in deltas)
        return {
            **self._head(self.format.object_name),
            "choices": choices,
            "usage": self.usage(completion_tokens),
            **self._prompt_token_ids(),
        }

    def opening_chunks(self) -> list[Json]:
        """Return the chunks that open a stream: roles, and the prompt's ids once."""
        openings = [self.format.opening(index) for index in range(len(self.requests))]
        chunks = [self._chunk([opening]) for opening in openings if opening]
        if chunks:
            chunks[0] |= self._prompt_token_ids()
        return chunks

    def chunk(self, delta: Delta) -> Json:
        """Return the chunk of one step."""
        return self._chunk([self.format.part(delta) | self._token_ids(delta.token_ids)])

    def usage_chunk(self, completion_tokens: int) -> Json:
        """Return the chunk that closes a stream with its usage."""
        return {**self._chunk([]), "usage": self.usage(completion_tokens)}

    def usage(self, completion_tokens: int) -> Json:
        """Return token counts."""
        prompt_tokens = count_prompt_tokens(self.requests)
        return schemas.Usage(
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            total_tokens=prompt_tokens + completion_tokens,
        ).model_dump()

    def _chunk(self, choices: list[Json]) -> Json:
        usage = {"usage": None} if self.stream_usage else {}
        return {**self._head(self.format.chunk_name), "choices": choices, **usage}

    def _head(self, kind: str) -> Json:
        identity, _, _ = self.requests[0].request_id.partition("/")
        return {"id": identity, "object": kind, "created": self.created, "model": self.model}

    def _token_ids(self, token_ids: Sequence[int]) -> Json:
        return {"token_ids": list(token_ids)} if self.return_token_ids else {}

    def _prompt_token_ids(self) -> Json:
        if not self.return_token_ids:
            return {}
        return {"prompt_token_ids": list(self.requests[0].prompt.token_ids)}
