"""Bounds a request's body before it is read."""

import contextlib
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import fastapi.responses

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class _BodyTooLargeError(Exception):
    """Raised inside `receive` when a body passes the limit."""


class BodyLimit:
    """ASGI middleware that answers 413 to bodies above a number of bytes."""

    def __init__(self, app: App, *, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, counting its bytes.

        Whatever the application makes of a body that ended early, the client
        is told of the limit.
        """
        if self._announces_too_much(scope):
            await self._refuse(scope, receive, send)
            return
        received = 0

        async def counted_receive() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_bytes:
                raise _BodyTooLargeError
            return message

        async def checked_send(message: Message) -> None:
            if received <= self._max_bytes:
                await send(message)

        with contextlib.suppress(_BodyTooLargeError):
            await self._app(scope, counted_receive, checked_send)
        if received > self._max_bytes:
            await self._refuse(scope, receive, send)

    def _announces_too_much(self, scope: Scope) -> bool:
        lengths = [value for name, value in scope.get("headers", ()) if name == b"content-length"]
        return any(value.isdigit() and int(value) > self._max_bytes for value in lengths)

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        message = f"the body is larger than {self._max_bytes} bytes; send smaller pictures"
        error = {
            "message": message,
            "type": "invalid_request_error",
            "param": None,
            "code": "body_too_large",
        }
        response = fastapi.responses.JSONResponse({"error": error}, 413)
        await response(scope, receive, send)
