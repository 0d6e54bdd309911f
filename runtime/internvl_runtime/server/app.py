"""The HTTP process: starts the engine worker, serves, and ends when either ends."""

import asyncio
import contextlib
import logging
import signal
from collections.abc import Iterator
from pathlib import Path

import fastapi
import uvicorn

import internvl_runtime
from internvl_runtime import errors, metrics, settings
from internvl_runtime.engine import client, folder
from internvl_runtime.server import chat, limits, routes
from internvl_runtime.server import errors as http_errors

logger = logging.getLogger(__name__)


def create_app(api: routes.Api, *, max_request_bytes: int) -> fastapi.FastAPI:
    """Return the ASGI application of an API."""
    app = fastapi.FastAPI(title="InternVL runtime", version=internvl_runtime.__version__)
    app.include_router(api.router)
    app.add_middleware(limits.BodyLimit, max_bytes=max_request_bytes)
    http_errors.install(app)
    return app


async def serve(engine_dir: Path, *, config: settings.Settings) -> None:
    """Serve an engine until SIGTERM; raises StageError when it can not start or its worker dies."""
    opened = folder.open_engine(engine_dir)
    engine = client.WorkerEngine(
        opened, threads=config.torch_threads, start_seconds=config.worker_start_seconds
    )
    preparer = chat.ChatPreparer(
        model=opened.model, tokens=opened.load_tokenizer(), limits=engine.limits, settings=config
    )
    names = config.served_model_names or (opened.key[:12],)
    api = routes.Api(
        engine,
        preparer,
        model_names=names,
        max_queued=config.max_queued_requests,
        threads=config.preparation_threads,
    )
    if config.metrics_port:
        metrics.serve(config.metrics_port)
    server = _Server(
        uvicorn.Config(
            create_app(api, max_request_bytes=config.max_request_bytes),
            host=config.host,
            port=config.port,
            log_level="info",
            access_log=False,
            timeout_graceful_shutdown=int(config.drain_seconds),
        )
    )
    await _run(server, engine)


class _Server(uvicorn.Server):
    """Leaves signals to us: uvicorn's own handling kills the process before the worker ends."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Stop accepting on SIGTERM and SIGINT, and let `serve` return."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.handle_exit, number, None)
        yield


async def _run(server: uvicorn.Server, engine: client.WorkerEngine) -> None:
    serving = asyncio.create_task(server.serve(), name="http")
    starting = asyncio.create_task(engine.start(), name="engine-start")
    try:
        await asyncio.wait([serving, starting], return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            starting.result()
            metrics.ENGINE_UP.set(1)
            logger.info("the engine is ready")
            await _wait_for_end(serving, engine)
    finally:
        server.should_exit = True
        await serving
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        await engine.stop()


async def _wait_for_end(serving: "asyncio.Task[None]", engine: client.WorkerEngine) -> None:
    gone = asyncio.create_task(engine.gone.wait(), name="engine-gone")
    await asyncio.wait([serving, gone], return_when=asyncio.FIRST_COMPLETED)
    metrics.ENGINE_UP.set(0)
    if gone.done() and not serving.done():
        raise errors.StageError(
            errors.Reason.CRASH_LOOP,
            "the engine worker ended while serving",
            remedy="read the container's log; out of memory is the usual cause",
        )
    gone.cancel()
