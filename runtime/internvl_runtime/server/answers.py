"""How answers are written: OpenAI's response objects, whole and as chunks of a stream."""

import codecs
import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from internvl_runtime.engine import interface
from internvl_runtime.server import schemas

Json = dict[str, Any]
TokenBytes = Callable[[int], bytes]
_UTF8 = codecs.getincrementaldecoder("utf-8")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Delta:
    """What one step adds to one answer."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    log_probabilities: tuple[interface.TokenLogProbabilities, ...] = ()
    finish_reason: str | None = None
    cached_tokens: int = 0
    """Of the prompt; told with the first delta of an answer."""


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

    @property
    def always_opens(self) -> bool:
        """Whether a stream begins with a choice of its own, also where no ids are asked for."""
        ...

    def opening(self, index: int) -> Json:
        """Return the choice that begins a stream."""
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
    always_opens: bool = True

    def opening(self, index: int) -> Json:
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
    always_opens = False

    def __init__(self, token_bytes: TokenBytes) -> None:
        self._token_bytes = token_bytes
        self._positions: dict[int, tuple[codecs.IncrementalDecoder, int]] = {}

    def opening(self, index: int) -> Json:
        """Return a choice without text: a completion has no role."""
        return {"index": index, "text": "", "logprobs": None, "finish_reason": None}

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
                told["tokens"].append(self._text(token_id))
                told["token_logprobs"].append(entry.chosen)
                told["text_offset"].append(self._advance(delta.index, token_id))
                likeliest_last = reversed(entry.top)
                told["top_logprobs"].append({self._text(i): value for i, value in likeliest_last})
        return told if told["tokens"] else None

    def _advance(self, index: int, token_id: int) -> int:
        """Return where a token begins, and go behind it; a part of a character has its start."""
        decoder, offset = self._positions.setdefault(index, (_UTF8(errors="replace"), 0))
        text = decoder.decode(self._token_bytes(token_id))
        self._positions[index] = (decoder, offset + len(text))
        return offset

    def _text(self, token_id: int) -> str:
        return self._token_bytes(token_id).decode("utf-8", "replace")


def count_prompt_tokens(requests: Sequence[interface.GenerationRequest]) -> int:
    """Return the prompt tokens of a response; a prompt with several answers counts once."""
    prompts = {id(request.prompt): request.prompt for request in requests}
    return sum(len(prompt.token_ids) for prompt in prompts.values())


class Tally:
    """Counts the tokens of a response while its deltas come."""

    def __init__(self) -> None:
        self.completion_tokens = 0
        self.cached_tokens: Counter[int] = Counter()
        """By the answer's index."""

    def add(self, delta: Delta) -> None:
        """Count a delta."""
        self.completion_tokens += len(delta.token_ids)
        self.cached_tokens[delta.index] += delta.cached_tokens


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
            ids = self._prompt_token_ids(index) | self._token_ids(token_ids)
            choices.append(self.format.whole(index, own) | ids)
        tally = Tally()
        for delta in deltas:
            tally.add(delta)
        return {
            **self._head(self.format.object_name),
            "choices": choices,
            "usage": self.usage(tally),
            **self._first_prompt(0),
        }

    def opening_chunks(self) -> list[Json]:
        """Return the chunks that open a stream: roles, and the ids of each prompt."""
        if not (self.format.always_opens or self.return_token_ids):
            return []
        openings = [self.format.opening(index) for index in range(len(self.requests))]
        return [
            self._chunk([opening | self._prompt_token_ids(index)]) | self._first_prompt(index)
            for index, opening in enumerate(openings)
        ]

    def chunk(self, delta: Delta) -> Json:
        """Return the chunk of one step."""
        return self._chunk([self.format.part(delta) | self._token_ids(delta.token_ids)])

    def usage_chunk(self, tally: Tally) -> Json:
        """Return the chunk that closes a stream with its usage."""
        return {**self._chunk([]), "usage": self.usage(tally)}

    def usage(self, tally: Tally) -> Json:
        """Return token counts; of several answers to one prompt the first one's cache counts."""
        firsts = {id(each.prompt): index for index, each in reversed([*enumerate(self.requests)])}
        prompt_tokens = count_prompt_tokens(self.requests)
        return schemas.Usage(
            prompt_tokens=prompt_tokens,
            completion_tokens=tally.completion_tokens,
            total_tokens=prompt_tokens + tally.completion_tokens,
            prompt_tokens_details=schemas.PromptTokensDetails(
                cached_tokens=sum(tally.cached_tokens[index] for index in firsts.values())
            ),
        ).model_dump()

    def _chunk(self, choices: list[Json]) -> Json:
        usage = {"usage": None} if self.stream_usage else {}
        return {**self._head(self.format.chunk_name), "choices": choices, **usage}

    def _head(self, kind: str) -> Json:
        identity, _, _ = self.requests[0].request_id.partition("/")
        return {"id": identity, "object": kind, "created": self.created, "model": self.model}

    def _token_ids(self, token_ids: Sequence[int]) -> Json:
        return {"token_ids": list(token_ids)} if self.return_token_ids else {}

    def _first_prompt(self, index: int) -> Json:
        """Return the ids of a chat's prompt, which all its answers share."""
        return self._prompt_token_ids(0) if index == 0 else {}

    def _prompt_token_ids(self, index: int) -> Json:
        if not self.return_token_ids:
            return {}
        return {"prompt_token_ids": list(self.requests[index].prompt.token_ids)}
