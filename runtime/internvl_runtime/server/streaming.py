"""Steps of an engine to responses, whole or as server-sent events."""

import asyncio
import dataclasses
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from internvl_runtime import errors, metrics
from internvl_runtime.engine import interface
from internvl_runtime.model import tokenizer
from internvl_runtime.server import errors as http_errors
from internvl_runtime.server import schemas

_DONE = "data: [DONE]\n\n"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Delta:
    """What one step adds to an answer."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """A running answer: its request, and how its responses are written."""

    request: interface.GenerationRequest
    model: str
    return_token_ids: bool
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    def completion(self, deltas: list[Delta]) -> dict[str, Any]:
        """Return the body of an unstreamed response."""
        choice: dict[str, Any] = {
            "index": 0,
            "message": {"role": "assistant", "content": "".join(delta.text for delta in deltas)},
            "logprobs": None,
            "finish_reason": deltas[-1].finish_reason,
        }
        token_ids = [token_id for delta in deltas for token_id in delta.token_ids]
        if self.return_token_ids:
            choice["token_ids"] = token_ids
        return {
            **self._head("chat.completion"),
            "choices": [choice],
            "usage": self.usage(len(token_ids)).model_dump(),
            **self._prompt_token_ids(),
        }

    def first_chunk(self) -> dict[str, Any]:
        """Return the chunk that opens a stream: the role, and the prompt's ids once."""
        choice = {"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
        return {**self._chunk([choice]), **self._prompt_token_ids()}

    def chunk(self, delta: Delta) -> dict[str, Any]:
        """Return the chunk of one step."""
        choice: dict[str, Any] = {
            "index": 0,
            "delta": {"content": delta.text},
            "finish_reason": delta.finish_reason,
        }
        if self.return_token_ids:
            choice["token_ids"] = list(delta.token_ids)
        return self._chunk([choice])

    def usage_chunk(self, completion_tokens: int) -> dict[str, Any]:
        """Return the chunk that closes a stream with its usage."""
        return {**self._chunk([]), "usage": self.usage(completion_tokens).model_dump()}

    def usage(self, completion_tokens: int) -> schemas.Usage:
        """Return the token counts of the request."""
        prompt_tokens = len(self.request.prompt.token_ids)
        return schemas.Usage(
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            total_tokens=prompt_tokens + completion_tokens,
        )

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head("chat.completion.chunk"), "choices": choices}

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.request.request_id,
            "object": kind,
            "created": self.created,
            "model": self.model,
        }

    def _prompt_token_ids(self) -> dict[str, Any]:
        if not self.return_token_ids:
            return {}
        return {"prompt_token_ids": list(self.request.prompt.token_ids)}


async def generate(
    engine: interface.Engine,
    request: interface.GenerationRequest,
    tokens: tokenizer.Tokenizer,
) -> AsyncGenerator[Delta, None]:
    """Submit a request and yield what each step adds.

    Leaving the loop early cancels the request; an error of the engine is raised.
    """
    steps: asyncio.Queue[interface.Step] = asyncio.Queue()
    decoder = tokenizer.IncrementalDecoder(tokens)
    admitted = time.monotonic()
    engine.submit(request, steps.put_nowait)
    metrics.PROMPT_TOKENS.inc(len(request.prompt.token_ids))
    metrics.REQUESTS_WAITING.inc()
    is_finished, is_first, reason = False, True, "cancelled"
    try:
        while not is_finished:
            step = await steps.get()
            is_finished = step.is_last
            if step.error is not None:
                reason = "error"
                raise step.error
            if is_first:
                metrics.TIME_TO_FIRST_TOKEN.observe(time.monotonic() - admitted)
                is_first = False
            metrics.GENERATION_TOKENS.inc(len(step.token_ids))
            reason = step.finish_reason.value if step.finish_reason else reason
            yield Delta(
                text=decoder.push(step.token_ids, final=is_finished),
                token_ids=step.token_ids,
                finish_reason=step.finish_reason.value if step.finish_reason else None,
            )
    finally:
        metrics.REQUESTS_WAITING.dec()
        metrics.REQUESTS.labels(reason).inc()
        if not is_finished:
            engine.cancel(request.request_id)


async def events(
    answer: Answer, deltas: AsyncIterator[Delta], first: Delta, *, include_usage: bool
) -> AsyncIterator[str]:
    """Yield the server-sent events of a stream whose first delta is already there.

    An error on the way is told as an event, and the stream ends without `[DONE]`.
    """
    yield _event(answer.first_chunk())
    yield _event(answer.chunk(first))
    completion_tokens = len(first.token_ids)
    try:
        async for delta in deltas:
            completion_tokens += len(delta.token_ids)
            yield _event(answer.chunk(delta))
    except errors.RuntimeBaseError as e:
        yield _event(http_errors.describe(e)[1])
        return
    if include_usage:
        yield _event(answer.usage_chunk(completion_tokens))
    yield _DONE


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n"
