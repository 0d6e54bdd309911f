"""The routes: each parses, delegates and returns."""

import asyncio
import concurrent.futures
import contextlib
import contextvars
import dataclasses
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator, Sequence
from typing import Any, TypeVar

import fastapi
import fastapi.responses

import internvl_runtime
from internvl_runtime import errors, metrics
from internvl_runtime.engine import interface
from internvl_runtime.model import prompt
from internvl_runtime.server import answers, limits, prepare, sampling, schemas, streaming
from internvl_runtime.server import drain as draining

logger = logging.getLogger(__name__)

T = TypeVar("T")

_STARTED = int(time.time())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Admission:
    """How much may wait for the engine."""

    max_requests: int
    max_bytes: int
    """Bytes of the pictures of all waiting requests."""
    threads: int
    """Requests that are prepared at the same time."""


class Api:
    """The OpenAI API of one engine."""

    def __init__(
        self,
        engine: interface.Engine,
        preparer: prepare.Preparer,
        *,
        model_names: tuple[str, ...],
        admission: Admission,
        drain: draining.Drain,
        stalled_seconds: float,
    ) -> None:
        self._engine = engine
        self._preparer = preparer
        self._model_names = model_names
        self._admission = admission
        self._drain = drain
        self._stalled_seconds = stalled_seconds
        self._preparing = 0
        self._held_bytes = 0
        self._threads = concurrent.futures.ThreadPoolExecutor(admission.threads, "prepare")
        self.router = fastapi.APIRouter(route_class=limits.JsonRoute)
        post, get = self.router.post, self.router.get
        post("/v1/chat/completions", response_model=None)(self.create_chat_completion)
        post("/v1/completions", response_model=None)(self.create_completion)
        post("/tokenize")(self.tokenize)
        get("/v1/models")(self.list_models)
        get("/v1/models/{name:path}")(self.retrieve_model)
        get("/version")(self.tell_version)
        get("/healthz")(self.check_health)
        get("/readyz")(self.check_readiness)
        # What load tools for vLLM ask first.
        get("/health")(self.check_readiness)

    async def create_chat_completion(
        self, body: schemas.ChatCompletionRequest, http: fastapi.Request
    ) -> fastapi.Response:
        """Answer a conversation."""
        model = self._name_of(body.model)
        requests = await _unless_disconnected(self._prepare_chat(body), http)
        form = answers.ChatFormat(token_bytes=self._preparer.tokens.token_bytes)
        return await self._respond(body, http, self._answer(body, model, requests, form))

    async def create_completion(
        self, body: schemas.CompletionRequest, http: fastapi.Request
    ) -> fastapi.Response:
        """Continue a text."""
        model = self._name_of(body.model)
        with self._counted_as_preparing():
            requests = await self._in_thread(lambda: self._preparer.prepare_completion(body))
        form = answers.CompletionFormat(self._preparer.tokens.token_bytes)
        return await self._respond(body, http, self._answer(body, model, requests, form))

    async def tokenize(
        self, body: schemas.TokenizeRequest, http: fastapi.Request
    ) -> dict[str, Any]:
        """Tell the token ids of a prompt or a conversation."""
        self._name_of(body.model)
        expanded = await _unless_disconnected(self._expand(body), http)
        return {
            "count": len(expanded.token_ids),
            "max_model_len": self._engine.limits.max_sequence_tokens,
            "tokens": list(expanded.token_ids),
        }

    async def list_models(self) -> dict[str, Any]:
        """List the names that `model` may have."""
        return {"object": "list", "data": [_describe_model(name) for name in self._model_names]}

    async def retrieve_model(self, name: str) -> dict[str, Any]:
        """Describe one of them."""
        return _describe_model(self._name_of(name))

    async def tell_version(self) -> dict[str, str]:
        """Tell the runtime's version."""
        return {"version": internvl_runtime.__version__}

    async def check_health(self) -> dict[str, str]:
        """Tell that the server answers."""
        return {"status": "ok"}

    async def check_readiness(self) -> dict[str, str]:
        """Tell whether new requests should be sent here."""
        if not self._engine.is_ready or self._drain.phase is not draining.Phase.SERVING:
            raise errors.EngineUnavailableError("the engine is not ready")
        return {"status": "ready"}

    async def _prepare_chat(self, body: schemas.ChatCompletionRequest) -> prepare.Requests:
        with self._counted_as_preparing():
            fetched = await self._preparer.loader.fetch(body.messages)
            return await self._in_thread(lambda: self._preparer.prepare_chat(body, fetched))

    async def _expand(self, body: schemas.TokenizeRequest) -> prompt.Prompt:
        with self._counted_as_preparing():
            if body.messages is None:
                text, special = body.prompt or "", body.add_special_tokens
                return await self._in_thread(
                    lambda: self._preparer.expand_text(text, add_special_tokens=special)
                )
            messages = body.messages
            fetched = await self._preparer.loader.fetch(messages)
            expanded, _ = await self._in_thread(
                lambda: self._preparer.expand_chat(messages, fetched)
            )
            return expanded

    @contextlib.contextmanager
    def _counted_as_preparing(self) -> Iterator[None]:
        """Count a request as waiting from the beginning; raises RequestError beyond the queue."""
        waiting = self._engine.statistics().requests + self._preparing
        if waiting >= self._admission.max_requests:
            raise _queue_full(f"{waiting} requests are waiting already")
        self._preparing += 1
        try:
            yield
        finally:
            self._preparing -= 1

    async def _in_thread(self, work: Callable[[], T]) -> T:
        context = contextvars.copy_context()
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, context.run, work)

    def _answer(
        self, body: sampling.Fields, model: str, requests: prepare.Requests, form: answers.Format
    ) -> answers.Answer:
        return answers.Answer(
            requests=requests,
            model=model,
            format=form,
            return_token_ids=body.return_token_ids,
            stream_usage=bool(body.stream_options and body.stream_options.include_usage),
        )

    async def _respond(
        self, body: sampling.Fields, http: fastapi.Request, answer: answers.Answer
    ) -> fastapi.Response:
        unknown = body.unknown_fields()
        if unknown:
            metrics.IGNORED_FIELDS.inc(len(unknown))
            logger.info("ignored the fields %r", unknown[:8])
        deltas = self._generate(answer.requests, body.stops)
        if body.stream:
            # The first step decides the status: an error before it is still a plain answer.
            first = await _unless_disconnected(anext(deltas), http)
            return streaming.EventResponse(
                streaming.events(answer, deltas, first),
                deltas,
                stalled_seconds=self._stalled_seconds,
            )
        collected = await _unless_disconnected(_collect(deltas), http)
        return fastapi.responses.JSONResponse(answer.completion(collected))

    async def _generate(
        self, requests: Sequence[interface.GenerationRequest], stop: tuple[str, ...]
    ) -> AsyncGenerator[answers.Delta, None]:
        size = sum(image.size for image in requests[0].images)
        if self._held_bytes + size > self._admission.max_bytes:
            raise _queue_full(f"{self._held_bytes} bytes of pictures are waiting already")
        self._held_bytes += size
        try:
            deltas = streaming.generate(self._engine, requests, self._preparer.tokens, stop=stop)
            async with contextlib.aclosing(deltas):
                async for delta in deltas:
                    yield delta
        finally:
            self._held_bytes -= size

    def _name_of(self, name: str | None) -> str:
        """Return the served name that a request means; raises RequestError for another."""
        if not name:
            return self._model_names[0]
        if name not in self._model_names:
            raise errors.RequestError(
                f"the model {name[:200]!r} is not served here; use one of "
                f"{', '.join(self._model_names)}",
                parameter="model",
                code="model_not_found",
                status=404,
            )
        return name


def _describe_model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": _STARTED, "owned_by": "internvl"}


def _queue_full(message: str) -> errors.RequestError:
    return errors.RequestError(f"{message}; try again later", code="queue_full", status=429)


async def _unless_disconnected(work: Coroutine[Any, Any, T], http: fastapi.Request) -> T:
    """Await work, and give it up when the client goes away."""
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_wait_for_disconnect(http))
    try:
        await asyncio.wait([working, watching], return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise errors.RequestError("the client has closed the connection", status=499)
        return working.result()
    finally:
        working.cancel()
        watching.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _collect(deltas: AsyncIterator[answers.Delta]) -> list[answers.Delta]:
    return [delta async for delta in deltas]


async def _wait_for_disconnect(http: fastapi.Request) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass
