"""The routes: each parses, delegates and returns."""

import asyncio
import concurrent.futures
import time
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from typing import Any, TypeVar

import fastapi
import fastapi.responses

from internvl_runtime import errors
from internvl_runtime.engine import interface
from internvl_runtime.server import chat, schemas, streaming

T = TypeVar("T")

_STARTED = int(time.time())


class Api:
    """The OpenAI API of one engine."""

    def __init__(
        self,
        engine: interface.Engine,
        preparer: chat.ChatPreparer,
        *,
        model_names: tuple[str, ...],
        max_queued: int,
        threads: int,
    ) -> None:
        self._engine = engine
        self._preparer = preparer
        self._model_names = model_names
        self._max_queued = max_queued
        self._preparing = 0
        self._threads = concurrent.futures.ThreadPoolExecutor(threads, "prepare")
        self.router = fastapi.APIRouter()
        self.router.post("/v1/chat/completions", response_model=None)(self.create_chat_completion)
        self.router.get("/v1/models")(self.list_models)
        self.router.get("/healthz")(self.check_health)
        self.router.get("/readyz")(self.check_readiness)

    async def create_chat_completion(
        self, body: schemas.ChatCompletionRequest, http: fastapi.Request
    ) -> fastapi.Response:
        """Answer a conversation."""
        self._check_model(body.model)
        request = await self._prepare(body)
        answer = streaming.Answer(
            request=request, model=body.model, return_token_ids=body.return_token_ids
        )
        deltas = streaming.generate(self._engine, request, self._preparer.tokens)
        return await self._respond(body, http, answer, deltas)

    async def list_models(self) -> dict[str, Any]:
        """List the names that `model` may have."""
        models = [
            {"id": name, "object": "model", "created": _STARTED, "owned_by": "internvl"}
            for name in self._model_names
        ]
        return {"object": "list", "data": models}

    async def check_health(self) -> dict[str, str]:
        """Tell that the server answers."""
        return {"status": "ok"}

    async def check_readiness(self) -> dict[str, str]:
        """Tell whether a request sent now would be answered."""
        if not self._engine.is_ready:
            raise errors.EngineUnavailableError("the engine is not ready")
        return {"status": "ready"}

    async def _prepare(self, body: schemas.ChatCompletionRequest) -> interface.GenerationRequest:
        """Prepare a request in a thread; it counts as waiting from the beginning."""
        if self._engine.statistics().requests + self._preparing >= self._max_queued:
            raise errors.RequestError(
                f"{self._max_queued} requests are waiting already; try again later",
                code="queue_full",
                status=429,
            )
        self._preparing += 1
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._threads, self._preparer.prepare, body)
        finally:
            self._preparing -= 1

    async def _respond(
        self,
        body: schemas.ChatCompletionRequest,
        http: fastapi.Request,
        answer: streaming.Answer,
        deltas: AsyncGenerator[streaming.Delta, None],
    ) -> fastapi.Response:
        if body.stream:
            # The first step decides the status: an error before it is still a plain answer.
            first = await _unless_disconnected(anext(deltas), http)
            include_usage = bool(body.stream_options and body.stream_options.include_usage)
            events = streaming.events(answer, deltas, first, include_usage=include_usage)
            return fastapi.responses.StreamingResponse(events, media_type="text/event-stream")
        collected = await _unless_disconnected(_collect(deltas), http)
        return fastapi.responses.JSONResponse(answer.completion(collected))

    def _check_model(self, name: str) -> None:
        if name not in self._model_names:
            raise errors.RequestError(
                f"the model {name!r} is not served here; use one of {', '.join(self._model_names)}",
                parameter="model",
                code="model_not_found",
                status=404,
            )


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


async def _collect(deltas: AsyncIterator[streaming.Delta]) -> list[streaming.Delta]:
    return [delta async for delta in deltas]


async def _wait_for_disconnect(http: fastapi.Request) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass
