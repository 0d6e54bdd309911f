"""The end of a server: not ready at once, closed only when everyone knows, never cutting a stream.

A pod that ends is taken out of its Service's endpoints, but every node learns
it a little later. Until then new requests still come, and are served.
"""

import asyncio
import enum

from internvl_runtime.server import asgi


class Phase(enum.Enum):
    """How far the end has come."""

    SERVING = "serving"
    LEAVING = "leaving"
    """Not ready, but everything is still answered."""
    CLOSED = "closed"
    """New requests are refused; running ones finish."""


class Drain:
    """What the middleware and the readiness probe go by."""

    def __init__(self) -> None:
        self.phase = Phase.SERVING
        self._running = 0
        self._idle = asyncio.Event()
        self._idle.set()

    async def leave(self, *, propagation_seconds: float, finish_seconds: float) -> None:
        """Go from serving to closed; returns when no request is left, or time is up."""
        self.phase = Phase.LEAVING
        await asyncio.sleep(propagation_seconds)
        self.phase = Phase.CLOSED
        try:
            await asyncio.wait_for(self._idle.wait(), finish_seconds)
        except TimeoutError:
            return

    def enter(self) -> None:
        """Count a request in."""
        self._running += 1
        self._idle.clear()

    def exit(self) -> None:
        """Count a request out."""
        self._running -= 1
        if not self._running:
            self._idle.set()


class DrainMiddleware:
    """ASGI middleware that counts requests, and refuses new ones when the server is closed."""

    def __init__(self, app: asgi.App, *, drain: Drain) -> None:
        self._app = app
        self._drain = drain

    async def __call__(self, scope: asgi.Scope, receive: asgi.Receive, send: asgi.Send) -> None:
        """Pass a request on, or answer 503."""
        if scope["type"] != "http" or scope["path"] in asgi.HEALTH_PATHS:
            await self._app(scope, receive, send)
            return
        leaving = asgi.adding_headers(send, self._connection_header)
        if self._drain.phase is Phase.CLOSED:
            response = asgi.refusal(
                503,
                "this server is shutting down; send the request again",
                kind="service_unavailable",
                code="shutting_down",
                headers={"Retry-After": "1"},
            )
            await response(scope, receive, leaving)
            return
        self._drain.enter()
        try:
            await self._app(scope, receive, leaving)
        finally:
            self._drain.exit()

    def _connection_header(self) -> list[tuple[bytes, bytes]]:
        is_serving = self._drain.phase is Phase.SERVING
        return [] if is_serving else [(b"connection", b"close")]
