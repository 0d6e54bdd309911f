"""The types of ASGI, and what the middlewares share."""

from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

import fastapi.responses

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

HEALTH_PATHS = frozenset({"/health", "/healthz", "/readyz"})
"""What a kubelet asks for: never behind a key, never refused for draining."""


def header_of(scope: Scope, name: bytes) -> str:
    """Return a request header, or an empty text."""
    values = [value for key, value in scope.get("headers", ()) if key == name]
    return values[0].decode("latin-1") if values else ""


def adding_headers(send: Send, headers: Callable[[], Iterable[tuple[bytes, bytes]]]) -> Send:
    """Return a `send` that adds headers to the response when it starts."""

    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", ()), *headers()]
        await send(message)

    return send_with_headers


def refusal(
    status: int, message: str, *, kind: str, code: str, headers: dict[str, str] | None = None
) -> fastapi.responses.JSONResponse:
    """Return an error in OpenAI's format."""
    error = {"message": message, "type": kind, "param": None, "code": code}
    return fastapi.responses.JSONResponse({"error": error}, status, headers=headers)
