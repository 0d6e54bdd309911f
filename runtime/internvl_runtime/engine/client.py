"""The engine as the server sees it: a worker process behind Unix sockets.

All methods are called in the server's event loop. Requests go to the worker at
once; it asks for the tiles of their pictures when it is about to need them.
"""

import asyncio
import contextlib
import dataclasses
import logging
import socket as sockets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from internvl_runtime import errors
from internvl_runtime.engine import channel, folder, interface, processes

logger = logging.getLogger(__name__)

_STOP_SECONDS = 10.0
_WATCH_SECONDS = 0.5
_SEND_SECONDS = 30.0
"""How long a worker may leave tiles untaken."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class WorkerOptions:
    """How a worker is started and watched."""

    threads: int
    """Of torch on a CPU; 0 leaves the choice to torch."""
    start_seconds: float
    """Most time for loading."""
    silent_seconds: float
    """Most time without a sign of life."""
    step_seconds: float
    """Most time of one engine step."""
    loading_threads: int
    """Pictures that are decoded at once."""
    kv_cache_bytes: int
    picture_cache_bytes: int
    step_log: Path | None


@dataclasses.dataclass(frozen=True)
class _Running:
    request: interface.GenerationRequest
    sink: interface.StepSink


class WorkerEngine:
    """Starts the worker, passes requests to it, and tells everyone when it is gone."""

    def __init__(
        self,
        engine: folder.EngineFolder,
        options: WorkerOptions,
        *,
        observer: interface.Observer,
    ) -> None:
        self.limits = engine.limits
        self.blocks = 0
        """Of the worker's key/value cache."""
        self._engine = engine
        self._options = options
        self._observer = observer
        self._running: dict[str, _Running] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._loading = asyncio.Semaphore(options.loading_threads)
        self._processes = processes.Processes(engine.ranks, speak_mpi=engine.speaks_mpi)
        self._writer: asyncio.StreamWriter | None = None
        self._tiles: sockets.socket | None = None
        self._heard = 0.0
        self._ready = False

    @property
    def gone(self) -> "asyncio.Future[errors.StageError]":
        """Why, once the worker has ended unasked."""
        return self._processes.failed

    @property
    def is_ready(self) -> bool:
        """Whether a request submitted now would be answered."""
        return self._ready

    async def start(self) -> None:
        """Start the worker and wait until it has loaded and verified the engine.

        Raises StageError when it can not.
        """
        self.gone.add_done_callback(self._fail_running)
        reader = await self._processes.unless_failed(
            self._start_worker(), seconds=self._options.start_seconds
        )
        self._heard = time.monotonic()
        self._ready = True
        self._processes.be_serving()
        self._start(self._receive(reader), "engine-receive")
        self._start(self._watch(), "engine-watch")

    def submit(self, request: interface.GenerationRequest, sink: interface.StepSink) -> None:
        """Queue a request. Raises EngineUnavailableError when the worker is gone."""
        if not self._ready:
            raise errors.EngineUnavailableError("the engine is not running")
        self._running[request.request_id] = _Running(request, sink)
        self._send(_to_submit(request))

    def cancel(self, request_id: interface.RequestId) -> None:
        """Stop a request, waiting or running; an unknown one is none."""
        if self._running.pop(request_id, None):
            self._send(channel.Cancel(request_id))

    def end_running(self, why: str) -> None:
        """Give up every request that is not answered, with an error that says why."""
        running, self._running = self._running, {}
        for request_id in running:
            self._send(channel.Cancel(request_id))
        _fail(running, why)

    def statistics(self) -> interface.EngineStatistics:
        """Return how many requests are not finished."""
        return interface.EngineStatistics(len(self._running))

    async def stop(self) -> None:
        """Ask the worker to end, and end it when it does not; one that loads hears nothing."""
        seconds = _STOP_SECONDS if self._tiles else 0
        self._ready = False
        with contextlib.suppress(ConnectionError):
            self._send(channel.Stop())
        await self._processes.stop(seconds=seconds)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._tiles:
            self._tiles.close()

    def _arguments(self) -> list[str]:
        options = self._options
        step_log = [f"--step-log={options.step_log}"] if options.step_log else []
        return [
            f"--engine={self._engine.path}",
            f"--threads={options.threads}",
            f"--kv-cache-bytes={options.kv_cache_bytes}",
            f"--picture-cache-bytes={options.picture_cache_bytes}",
            *step_log,
        ]

    async def _start_worker(self) -> asyncio.StreamReader:
        with channel.listen_for_tiles(channel.tiles_path(self._processes.socket)) as listening:
            reader, self._writer = await self._processes.start(self._arguments())
            await self._wait_until_ready(reader)
            self._tiles = await self._accept(listening)
        return reader

    async def _wait_until_ready(self, reader: asyncio.StreamReader) -> None:
        try:
            message = await channel.read_to_server(reader)
        except (asyncio.IncompleteReadError, ConnectionError):
            self._processes.lose()
            raise await asyncio.shield(self.gone) from None
        match message:
            case channel.Failed(reason, text, remedy):
                told = self._processes.name(0, text)
                raise errors.StageError(errors.Reason(reason), told, remedy=remedy)
            case channel.Ready(channel.VERSION, blocks):
                self.blocks = blocks
            case _:
                raise errors.EngineIncompatibleError(
                    f"the engine worker answered {message!r}",
                    remedy="use one release of server and worker: the runtime image as it is",
                )

    async def _accept(self, listening: sockets.socket) -> sockets.socket:
        accepting = asyncio.get_running_loop().sock_accept(listening)
        connected, _ = await asyncio.wait_for(accepting, _SEND_SECONDS)
        connected.settimeout(_SEND_SECONDS)
        return connected

    async def _receive(self, reader: asyncio.StreamReader) -> None:
        try:
            while True:
                message = await channel.read_to_server(reader)
                self._heard = time.monotonic()
                self._take(message)
        except (asyncio.IncompleteReadError, ConnectionError):
            self._processes.lose()

    def _take(self, message: channel.ToServer) -> None:
        match message:
            case channel.Steps(steps, reports):
                for step in steps:
                    self._deliver(step)
                for report in reports:
                    self._observer.observe_step(report)
            case channel.LoadPicture(request_id, index):
                self._start(self._send_picture(request_id, index), f"picture {request_id}")
            case channel.Heartbeat(step_seconds, load):
                self._observer.observe_load(load)
                if step_seconds > self._options.step_seconds:
                    self._give_up(
                        f"an engine step has been running for {step_seconds:.0f} s",
                        setting="INTERNVL_RUNTIME_WORKER_STEP_SECONDS",
                    )

    def _deliver(self, result: channel.StepResult) -> None:
        running = self._running.get(result.request_id)
        if running is None:
            return
        step = interface.Step(
            request_id=running.request.request_id,
            token_ids=result.token_ids,
            log_probabilities=result.log_probabilities,
            finish_reason=result.finish_reason,
            start=result.start,
            error=channel.error_of(result.failure) if result.failure else None,
        )
        if step.is_last:
            del self._running[result.request_id]
        running.sink(step)

    async def _send_picture(self, request_id: str, index: int) -> None:
        """Load a picture and hand its tiles over; the worker hears of a failure."""
        async with self._loading:
            running = self._running.get(request_id)
            if running is None:
                return
            image = running.request.images[index]
            try:
                await asyncio.to_thread(self._load_and_send, image)
            except errors.RequestError as e:
                self._send(channel.PictureFailed(image.content_hash, channel.failure_of(e)))
            except (ConnectionError, TimeoutError) as e:
                self._give_up(f"the engine worker does not take pictures: {e}")
            except Exception:
                logger.exception("a picture of %s could not be loaded", request_id)
                failure = channel.Failure(message="this request failed; the log says why")
                self._send(channel.PictureFailed(image.content_hash, failure))

    def _load_and_send(self, image: interface.Image) -> None:
        if self._tiles:
            channel.send_tiles(self._tiles, image.content_hash, image.load())

    async def _watch(self) -> None:
        """Give a worker up that gives no sign of life."""
        while self._ready:
            await asyncio.sleep(_WATCH_SECONDS)
            silent = time.monotonic() - self._heard
            if silent > self._options.silent_seconds:
                self._give_up(
                    f"the engine has not been heard of for {silent:.0f} s",
                    setting="INTERNVL_RUNTIME_WORKER_SILENT_SECONDS",
                )

    def _give_up(self, why: str, *, setting: str | None = None) -> None:
        if not self.gone.done():
            logger.error("%s: ending it", why)
        self._processes.fail(why, setting=setting)

    def _fail_running(self, gone: "asyncio.Future[errors.StageError]") -> None:
        self._ready = False
        if gone.cancelled():
            return
        running, self._running = self._running, {}
        _fail(running, gone.result().message)

    def _send(self, message: channel.ToWorker) -> None:
        if self._writer is not None:
            self._writer.write(channel.encode(message))

    def _start(self, work: Any, name: str) -> None:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _fail(running: Mapping[str, _Running], why: str) -> None:
    error = errors.EngineUnavailableError(why)
    for each in running.values():
        each.sink(interface.Step(request_id=each.request.request_id, token_ids=(), error=error))


def _to_submit(request: interface.GenerationRequest) -> channel.Submit:
    return channel.Submit(
        request_id=request.request_id,
        token_ids=request.prompt.token_ids,
        placements=request.prompt.placements,
        content_hashes=tuple(image.content_hash for image in request.images),
        stop_token_ids=request.stop_token_ids,
        sampling=request.sampling,
        constraint=request.constraint,
        priority=request.priority,
    )
