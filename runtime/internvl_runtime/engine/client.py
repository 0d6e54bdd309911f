"""The engine as the server sees it: a worker process behind a Unix socket.

One request is with the worker at a time; the others wait here, undecoded, in
the order of their arrival. All methods are called in the server's event loop.
"""

import asyncio
import contextlib
import dataclasses
import logging
import sys
import tempfile
from collections import deque
from pathlib import Path
from typing import Any

from internvl_runtime import errors
from internvl_runtime.engine import channel, folder, interface

logger = logging.getLogger(__name__)

_STOP_SECONDS = 10.0


@dataclasses.dataclass(frozen=True)
class _Waiting:
    request: interface.GenerationRequest
    sink: interface.StepSink


class WorkerEngine:
    """Starts the worker, passes requests to it, and tells everyone when it is gone."""

    def __init__(self, engine: folder.EngineFolder, *, threads: int, start_seconds: float) -> None:
        self.limits = engine.limits
        self._engine = engine
        self._threads = threads
        self._start_seconds = start_seconds
        self._waiting: deque[_Waiting] = deque()
        self._running: _Waiting | None = None
        self._dispatching: asyncio.Task[None] | None = None
        self._receiving: asyncio.Task[None] | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._arrived = asyncio.Event()
        self._finished = asyncio.Event()
        self._ready = False
        self.gone = asyncio.Event()
        """Set when the worker has ended, wanted or not."""

    @property
    def is_ready(self) -> bool:
        """Whether a request submitted now would be answered."""
        return self._ready

    async def start(self) -> None:
        """Start the worker and wait until it has loaded and verified the engine."""
        connected: asyncio.Future[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = (
            asyncio.get_running_loop().create_future()
        )
        with tempfile.TemporaryDirectory(prefix="internvl-") as name:
            socket = Path(name) / "engine.sock"
            server = await asyncio.start_unix_server(
                lambda reader, writer: connected.set_result((reader, writer)), socket
            )
            async with server:
                self._process = await self._spawn(socket)
                ended = asyncio.ensure_future(self._process.wait())
                waited: list[asyncio.Future[Any]] = [connected, ended]
                await asyncio.wait(
                    waited,
                    timeout=self._start_seconds,
                    return_when=asyncio.FIRST_COMPLETED,
                )
                ended.cancel()
                if not connected.done():
                    raise _start_error("the engine worker did not start; its log says why")
                reader, self._writer = connected.result()
        await self._wait_until_ready(reader)
        self._receiving = asyncio.create_task(self._receive(reader), name="engine-receive")
        self._dispatching = asyncio.create_task(self._dispatch(), name="engine-dispatch")

    def submit(self, request: interface.GenerationRequest, sink: interface.StepSink) -> None:
        """Queue a request. Raises EngineUnavailableError when the worker is gone."""
        if not self._ready:
            raise errors.EngineUnavailableError("the engine is not running")
        self._waiting.append(_Waiting(request, sink))
        self._arrived.set()

    def cancel(self, request_id: interface.RequestId) -> None:
        """Stop a request, waiting or running; an unknown one is none."""
        for waiting in self._waiting:
            if waiting.request.request_id == request_id:
                self._waiting.remove(waiting)
                return
        if self._running and self._running.request.request_id == request_id:
            self._running = dataclasses.replace(self._running, sink=_discard)
            self._send(channel.Cancel(request_id))

    def statistics(self) -> interface.EngineStatistics:
        """Return how many requests are not finished."""
        return interface.EngineStatistics(len(self._waiting) + (self._running is not None))

    async def stop(self) -> None:
        """Ask the worker to end, and end it when it does not."""
        self._ready = False
        if self._process is None:
            return
        with contextlib.suppress(ConnectionError):
            self._send(channel.Stop())
        try:
            await asyncio.wait_for(self._process.wait(), _STOP_SECONDS)
        except TimeoutError:
            logger.warning("the engine worker did not end within %s s", _STOP_SECONDS)
            self._process.kill()
            await self._process.wait()
        for task in (self._dispatching, self._receiving):
            if task:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

    async def _spawn(self, socket: Path) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "internvl_runtime.engine.worker",
            f"--engine={self._engine.path}",
            f"--socket={socket}",
            f"--threads={self._threads}",
        )

    async def _wait_until_ready(self, reader: asyncio.StreamReader) -> None:
        try:
            message = await asyncio.wait_for(channel.read_to_server(reader), self._start_seconds)
        except (asyncio.IncompleteReadError, ConnectionError, TimeoutError) as e:
            raise _start_error("the engine worker ended while loading; its log says why") from e
        match message:
            case channel.Failed(reason, text, remedy):
                raise errors.StageError(errors.Reason(reason), text, remedy=remedy)
            case channel.Ready(channel.VERSION):
                self._ready = True
            case _:
                raise _start_error(f"the engine worker answered {message!r}")

    async def _dispatch(self) -> None:
        while True:
            await self._arrived.wait()
            if not self._waiting:
                self._arrived.clear()
                continue
            self._running = self._waiting.popleft()
            self._finished.clear()
            try:
                await self._answer(self._running.request)
            except errors.RequestError as e:
                self._finish_with(e)
            except Exception:
                logger.exception("request %s failed", self._running.request.request_id)
                self._finish_with(errors.EngineUnavailableError("this request failed"))

    async def _answer(self, request: interface.GenerationRequest) -> None:
        with contextlib.ExitStack() as shared:
            tiles = await asyncio.to_thread(_share_tiles, request, shared)
            self._send(_to_submit(request, tiles))
            await self._finished.wait()

    async def _receive(self, reader: asyncio.StreamReader) -> None:
        try:
            while True:
                message = await channel.read_to_server(reader)
                if isinstance(message, channel.Steps):
                    for step in message.steps:
                        self._deliver(step)
        except (asyncio.IncompleteReadError, ConnectionError):
            self._worker_is_gone()

    def _deliver(self, result: channel.StepResult) -> None:
        running = self._running
        if running is None or running.request.request_id != result.request_id:
            return
        step = interface.Step(
            request_id=running.request.request_id,
            token_ids=result.token_ids,
            log_probabilities=result.log_probabilities,
            finish_reason=result.finish_reason,
            error=_error_of(result),
        )
        running.sink(step)
        if step.is_last:
            self._running = None
            self._finished.set()

    def _finish_with(self, error: errors.RuntimeBaseError) -> None:
        if self._running:
            request_id = self._running.request.request_id
            self._running.sink(interface.Step(request_id=request_id, token_ids=(), error=error))
        self._running = None
        self._finished.set()

    def _worker_is_gone(self) -> None:
        self._ready = False
        error = errors.EngineUnavailableError("the engine ended while this request was running")
        self._finish_with(error)
        while self._waiting:
            self._running = self._waiting.popleft()
            self._finish_with(error)
        self.gone.set()

    def _send(self, message: channel.ToWorker) -> None:
        if self._writer is not None:
            self._writer.write(channel.encode(message))


def _share_tiles(
    request: interface.GenerationRequest, shared: contextlib.ExitStack
) -> tuple[channel.SharedArray, ...]:
    """Share the tiles of a request; leaving `shared` drops those that nobody took."""
    tiles = []
    for image in request.images:
        tiles.append(channel.share(image.load()))
        shared.callback(channel.drop, tiles[-1])
    return tuple(tiles)


def _to_submit(
    request: interface.GenerationRequest, tiles: tuple[channel.SharedArray, ...]
) -> channel.Submit:
    return channel.Submit(
        request_id=request.request_id,
        token_ids=request.prompt.token_ids,
        placements=request.prompt.placements,
        tiles=tiles,
        stop_token_ids=request.stop_token_ids,
        sampling=request.sampling,
        constraint=request.constraint,
    )


def _error_of(result: channel.StepResult) -> errors.RuntimeBaseError | None:
    if result.error is None:
        return None
    if result.parameter is None:
        return errors.EngineUnavailableError(result.error)
    return errors.RequestError(result.error, parameter=result.parameter or None)


def _start_error(message: str) -> errors.StageError:
    return errors.StageError(
        errors.Reason.CRASH_LOOP, message, remedy="read the log of the container"
    )


def _discard(step: interface.Step) -> None:
    del step
