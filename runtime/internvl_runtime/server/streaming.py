"""Steps of an engine to deltas of answers, and deltas to server-sent events."""

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import fastapi.responses

from internvl_runtime import errors, metrics
from internvl_runtime.engine import interface
from internvl_runtime.model import tokenizer
from internvl_runtime.server import answers, asgi, stops
from internvl_runtime.server import errors as http_errors

logger = logging.getLogger(__name__)

_DONE = "data: [DONE]\n\n"


async def generate(
    engine: interface.Engine,
    requests: Sequence[interface.GenerationRequest],
    tokens: tokenizer.Tokenizer,
    *,
    stop: Sequence[str] = (),
) -> AsyncGenerator[answers.Delta, None]:
    """Submit the requests of one response and yield what each step adds to one of them.

    Leaving the loop early cancels what still runs; an error of the engine is raised.
    """
    steps: asyncio.Queue[interface.Step] = asyncio.Queue()
    running = {
        request.request_id: _Choice(index, request, tokens, stop)
        for index, request in enumerate(requests)
    }
    started: list[interface.RequestId] = []
    try:
        for request_id, choice in running.items():
            engine.submit(choice.request, steps.put_nowait)
            started.append(request_id)
            choice.admit()
        metrics.PROMPT_TOKENS.inc(answers.count_prompt_tokens(requests))
        while running:
            step = await steps.get()
            current = running.get(step.request_id)
            if current is None:
                continue
            if step.error is not None:
                current.reason = "error"
                raise step.error
            delta = current.take(step)
            if delta.finish_reason:
                del running[step.request_id]
                current.leave()
                if not step.is_last:
                    engine.cancel(step.request_id)
            yield delta
    finally:
        for request_id in started:
            if request_id in running:
                running[request_id].leave()
                engine.cancel(request_id)


class _Choice:
    """One running answer."""

    def __init__(
        self,
        index: int,
        request: interface.GenerationRequest,
        tokens: tokenizer.Tokenizer,
        stop: Sequence[str],
    ) -> None:
        self.index = index
        self.request = request
        self.reason = "cancelled"
        self._decoder = tokenizer.IncrementalDecoder(tokens)
        self._stops = stops.StopFinder(stop)
        self._admitted = 0.0
        self._last: float | None = None
        """When the step before came."""

    def admit(self) -> None:
        self._admitted = time.monotonic()
        metrics.REQUESTS_ADMITTED.inc()

    def leave(self) -> None:
        metrics.REQUESTS_ADMITTED.dec()
        metrics.REQUEST_TIME.observe(time.monotonic() - self._admitted)
        metrics.REQUESTS.labels(self.reason).inc()

    def take(self, step: interface.Step) -> answers.Delta:
        """Return what a step adds; a stop text ends the answer as a stop token does."""
        self._observe(step)
        decoded = self._decoder.push(step.token_ids, final=step.is_last)
        text = self._stops.push(decoded, final=step.is_last)
        finish = interface.FinishReason.STOP if self._stops.is_found else step.finish_reason
        self.reason = finish.value if finish else self.reason
        return answers.Delta(
            index=self.index,
            text=text,
            token_ids=step.token_ids,
            log_probabilities=step.log_probabilities,
            finish_reason=finish.value if finish else None,
            cached_tokens=step.start.cached_tokens if step.start else 0,
        )

    def _observe(self, step: interface.Step) -> None:
        now = time.monotonic()
        if self._last is None:
            metrics.TIME_TO_FIRST_TOKEN.observe(now - self._admitted)
        else:
            metrics.INTER_TOKEN_LATENCY.observe(now - self._last)
        if step.start:
            metrics.QUEUE_TIME.observe(step.start.queued_seconds)
        self._last = now
        metrics.GENERATION_TOKENS.inc(len(step.token_ids))


async def events(
    answer: answers.Answer, deltas: AsyncGenerator[answers.Delta, None], first: answers.Delta
) -> AsyncGenerator[str, None]:
    """Yield the server-sent events of a stream whose first delta is already there.

    An error on the way is told as an event, behind the usage so far; the
    stream ends without `[DONE]` then.
    """
    for opening in answer.opening_chunks():
        yield _event(opening)
    yield _event(answer.chunk(first))
    tally = answers.Tally()
    tally.add(first)
    failure: errors.RuntimeBaseError | None = None
    async with contextlib.aclosing(deltas):
        try:
            async for delta in deltas:
                tally.add(delta)
                yield _event(answer.chunk(delta))
        except errors.RuntimeBaseError as e:
            failure = e
    if answer.stream_usage:
        yield _event(answer.usage_chunk(tally))
    yield _event(http_errors.describe(failure)[1]) if failure else _DONE


class EventResponse(fastapi.responses.StreamingResponse):
    """A stream of events that ends the work behind it, however it ends itself."""

    def __init__(
        self,
        events: AsyncGenerator[str, None],
        deltas: AsyncGenerator[answers.Delta, None],
        *,
        stalled_seconds: float,
    ) -> None:
        super().__init__(events, media_type="text/event-stream")
        self._sources = (events, deltas)
        self._stalled_seconds = stalled_seconds

    async def __call__(self, scope: asgi.Scope, receive: asgi.Receive, send: asgi.Send) -> None:
        """Send the events; a client that goes away, or stops reading, cancels its request."""

        async def send_in_time(message: asgi.Message) -> None:
            async with asyncio.timeout(self._stalled_seconds):
                await send(message)

        try:
            await super().__call__(scope, receive, send_in_time)
        except TimeoutError:
            logger.warning("a client did not read its answer for %g s", self._stalled_seconds)
        finally:
            for source in self._sources:
                await source.aclose()


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n"
