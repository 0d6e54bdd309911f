"""Bounds of a request's body: its bytes before it is read, its depth before it is parsed."""

import asyncio
import contextlib
import json
import re
from collections.abc import Callable, Coroutine
from typing import Any

import fastapi
import fastapi.routing
import starlette.exceptions

from internvl_runtime.server import asgi

MAX_DEPTH = 64
_MAX_PARTS = 200_000
# A text that never ends is one match up to the end: the scan is linear in any case.
_STRING_OR_BRACKET = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*(?:"|\\?\Z)|[\[{]|[\]}]', re.DOTALL)


class _BodyTooLargeError(Exception):
    """Raised inside `receive` when a body passes the limit."""


class BodyLimit:
    """ASGI middleware that answers 413 to bodies above a number of bytes."""

    def __init__(self, app: asgi.App, *, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: asgi.Scope, receive: asgi.Receive, send: asgi.Send) -> None:
        """Pass a request on, counting its bytes.

        Whatever the application makes of a body that ended early, the client
        is told of the limit.
        """
        if self._announces_too_much(scope):
            await self._refuse(scope, receive, send)
            return
        received = 0

        async def counted_receive() -> asgi.Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_bytes:
                raise _BodyTooLargeError
            return message

        async def checked_send(message: asgi.Message) -> None:
            if received <= self._max_bytes:
                await send(message)

        with contextlib.suppress(_BodyTooLargeError):
            await self._app(scope, counted_receive, checked_send)
        if received > self._max_bytes:
            await self._refuse(scope, receive, send)

    def _announces_too_much(self, scope: asgi.Scope) -> bool:
        length = asgi.header_of(scope, b"content-length")
        return length.isdigit() and int(length) > self._max_bytes

    async def _refuse(self, scope: asgi.Scope, receive: asgi.Receive, send: asgi.Send) -> None:
        response = asgi.refusal(
            413,
            f"the body is larger than {self._max_bytes} bytes; send smaller pictures",
            kind="invalid_request_error",
            code="body_too_large",
        )
        await response(scope, receive, send)


class JsonRoute(fastapi.routing.APIRoute):
    """A route whose JSON body is bounded in depth."""

    def get_route_handler(
        self,
    ) -> Callable[[fastapi.Request], Coroutine[Any, Any, fastapi.Response]]:
        """Wrap the request."""
        handle = super().get_route_handler()

        async def handle_bounded(request: fastapi.Request) -> fastapi.Response:
            return await handle(_BoundedRequest(request.scope, request.receive))

        return handle_bounded


class _BoundedRequest(fastapi.Request):
    async def json(self) -> Any:
        return await asyncio.to_thread(_parse, await self.body())


def _parse(body: bytes) -> Any:
    """Parse a body whose shape is within the limits; raises a 400 for another."""
    check_shape(body)
    return json.loads(body)


def check_shape(body: bytes) -> None:
    """Check how deep and how many the brackets of a JSON text are, without parsing it."""
    depth = 0
    for count, match in enumerate(_STRING_OR_BRACKET.finditer(body)):
        match match[0][:1]:
            case b"[" | b"{":
                depth += 1
            case b"]" | b"}":
                depth -= 1
        if depth > MAX_DEPTH:
            raise _refused(f"the JSON is nested deeper than {MAX_DEPTH} levels; send a flatter one")
        if count > _MAX_PARTS:
            raise _refused(f"the JSON has more than {_MAX_PARTS} texts and brackets; send less")


def _refused(message: str) -> starlette.exceptions.HTTPException:
    return starlette.exceptions.HTTPException(400, message)
