"""Bounds a request's body before it is read."""

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
        """Pass a request on, counting its bytes."""
        received = 0
        has_started = False

        async def counted_receive() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_bytes:
                raise _BodyTooLargeError
            return message

        async def noted_send(message: Message) -> None:
            nonlocal has_started
            has_started = True
            await send(message)

        try:
            await self._app(scope, counted_receive, noted_send)
        except _BodyTooLargeError:
            if not has_started:
                await self._refuse(scope, receive, send)

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
