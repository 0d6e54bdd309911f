"""A name for every request, in its answer and in the log."""

import contextvars
import logging
import re
import time
import uuid

from internvl_runtime.server import asgi

logger = logging.getLogger(__name__)

_HEADER = b"x-request-id"
_MOST_LOGGED = 200
_ACCEPTED = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")

current: contextvars.ContextVar[str] = contextvars.ContextVar("request_id", default="-")
"""The request that is being answered; `-` outside of one."""


class RequestIds:
    """ASGI middleware: takes over X-Request-ID or makes one, returns it, and logs by it."""

    def __init__(self, app: asgi.App) -> None:
        self._app = app

    async def __call__(self, scope: asgi.Scope, receive: asgi.Receive, send: asgi.Send) -> None:
        """Pass a request on under its name."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = asgi.header_of(scope, _HEADER)
        name = given if _ACCEPTED.fullmatch(given) else uuid.uuid4().hex
        started, status = time.monotonic(), 0

        async def watching_send(message: asgi.Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        token = current.set(name)
        try:
            named = asgi.adding_headers(watching_send, lambda: [(_HEADER, name.encode())])
            await self._app(scope, receive, named)
        finally:
            if scope["path"] not in asgi.HEALTH_PATHS:
                elapsed = time.monotonic() - started
                path = scope["path"][:_MOST_LOGGED]
                logger.info("%s %r %s %.3f s", scope["method"], path, status, elapsed)
            current.reset(token)


class AddRequestId(logging.Filter):
    """Gives log records the name of the request that they belong to."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Set `request_id`."""
        record.request_id = current.get()
        return True
