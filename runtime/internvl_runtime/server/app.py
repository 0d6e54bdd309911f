"""The HTTP process: starts the engine worker, serves, and ends when either ends."""

import asyncio
import contextlib
import logging
import signal
import socket
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fastapi
import fastapi.middleware.cors
import uvicorn

import internvl_runtime
from internvl_runtime import errors, metrics, settings
from internvl_runtime.engine import client, folder
from internvl_runtime.server import (
    asgi,
    drain,
    identity,
    keys,
    limits,
    prepare,
    routes,
)
from internvl_runtime.server import errors as http_errors
from internvl_runtime.vision import fetch

logger = logging.getLogger(__name__)

_BACKLOG = 2048
"""Connections that may wait to be accepted, as uvicorn has it."""


def create_app(api: routes.Api, *, config: settings.Settings, draining: drain.Drain) -> asgi.App:
    """Return the ASGI application of an API, inside its middlewares."""
    app = fastapi.FastAPI(
        title="InternVL runtime",
        version=internvl_runtime.__version__,
        docs_url=None,
        redoc_url=None,
    )
    app.include_router(api.router)
    http_errors.install(app)
    wrapped: asgi.App = limits.BodyLimit(app, max_bytes=config.max_request_bytes)
    if config.api_keys_file:
        wrapped = keys.ApiKeyMiddleware(wrapped, keys=keys.ApiKeys(config.api_keys_file))
    if config.cors_allowed_origins:
        wrapped = fastapi.middleware.cors.CORSMiddleware(
            wrapped,
            allow_origins=list(config.cors_allowed_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["X-Request-ID"],
        )
    return identity.RequestIds(drain.DrainMiddleware(wrapped, drain=draining))


async def serve(
    engine_dir: Path, *, config: settings.Settings, step_log: Path | None = None
) -> None:
    """Serve an engine until SIGTERM; raises StageError when it can not start or its worker dies."""
    _name_requests_in_logs()
    # Pillow warns of what its decoders find; a broken picture is told to its sender.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    opened = folder.open_engine(engine_dir)
    logger.info(
        "serving engine %s of %s for %s, %d ranks",
        opened.key[:12], opened.backend, opened.architecture, opened.ranks,
    )  # fmt: skip
    engine = client.WorkerEngine(
        opened, _worker_options(config, step_log), observer=metrics.EngineObserver()
    )
    fetcher = fetch.Fetcher(fetch_policy(config))
    preparer = prepare.create_preparer(
        model=opened.model,
        tokens=opened.load_tokenizer(),
        limits=opened.limits,
        fetcher=fetcher,
        config_=config,
    )
    draining = drain.Drain()
    api = routes.Api(
        engine,
        preparer,
        model_names=config.served_model_names or (opened.key[:12],),
        admission=routes.Admission(
            max_requests=config.max_queued_requests,
            max_bytes=config.max_waiting_bytes,
            threads=config.preparation_threads,
        ),
        drain=draining,
        stalled_seconds=config.stalled_seconds,
    )
    app = create_app(api, config=config, draining=draining)
    with _naming(settings.PREFIX + "METRICS_PORT", config.metrics_port):
        if config.metrics_port:
            metrics.serve(config.host, config.metrics_port)
    with _naming(settings.PREFIX + "PORT", config.port):
        listener = _listen(config.host, config.port)
    server = _Server(
        uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=1,
        ),
        draining,
        config,
        end_running=engine.end_running,
    )
    try:
        await _run(server, engine, listener)
    finally:
        await fetcher.close()


@contextlib.contextmanager
def _naming(setting: str, port: int) -> Iterator[None]:
    """Tell which setting's port can not be listened on."""
    try:
        yield
    except OSError as e:
        raise errors.StageError(
            errors.Reason.CRASH_LOOP,
            f"{setting}={port} can not be listened on: {e}",
            remedy="set another port, or end what has this one",
        ) from e


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=_BACKLOG)


def _worker_options(config: settings.Settings, step_log: Path | None) -> client.WorkerOptions:
    return client.WorkerOptions(
        threads=config.torch_threads,
        start_seconds=config.worker_start_seconds,
        silent_seconds=config.worker_silent_seconds,
        step_seconds=config.worker_step_seconds,
        loading_threads=config.preparation_threads,
        kv_cache_bytes=config.kv_cache_bytes,
        picture_cache_bytes=config.picture_cache_bytes,
        step_log=step_log,
    )


def fetch_policy(config: settings.Settings) -> fetch.FetchPolicy:
    """Return what the settings allow to be fetched."""
    return fetch.FetchPolicy(
        allowed_hosts=config.fetch_allowed_hosts,
        private_hosts=config.fetch_private_hosts,
        proxy=config.fetch_proxy,
        seconds=config.fetch_seconds,
    )


class _Server(uvicorn.Server):
    """Drains on SIGTERM and SIGINT before it stops; a second signal stops it at once."""

    def __init__(
        self,
        config: uvicorn.Config,
        draining: drain.Drain,
        settings_: settings.Settings,
        *,
        end_running: Callable[[str], None],
    ) -> None:
        super().__init__(config)
        self._end_running = end_running
        self._draining = draining
        self._settings = settings_
        self._leaving: asyncio.Task[None] | None = None

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Drain on a signal, and let `serve` return; uvicorn's own way ends the process."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        yield

    def _on_signal(self) -> None:
        if self._leaving:
            self._end_running("the server was told twice to end")
            self.should_exit = True
            return
        logger.info("leaving: not ready, and closed in %g s", self._settings.propagation_seconds)
        self._leaving = asyncio.create_task(self._leave(), name="drain")

    async def _leave(self) -> None:
        await self._draining.leave(
            propagation_seconds=self._settings.propagation_seconds,
            finish_seconds=self._settings.drain_seconds,
        )
        self._end_running(
            f"the server ends, and this answer took longer than the "
            f"{self._settings.drain_seconds:g} s that it waits"
        )
        self.should_exit = True


async def _run(
    server: uvicorn.Server, engine: client.WorkerEngine, listener: socket.socket
) -> None:
    serving = asyncio.create_task(server.serve(sockets=[listener]), name="http")
    starting = asyncio.create_task(engine.start(), name="engine-start")
    try:
        await asyncio.wait([serving, starting], return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            starting.result()
            metrics.ENGINE_UP.set(1)
            metrics.CACHE_BLOCKS.set(engine.blocks)
            host, port = listener.getsockname()[:2]
            logger.info(
                "the engine is ready, with %d blocks of cache: http://%s:%d/v1",
                engine.blocks, host, port,
            )  # fmt: skip
            await _wait_for_end(serving, engine)
    finally:
        server.should_exit = True
        await serving
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        await engine.stop()


async def _wait_for_end(serving: "asyncio.Task[None]", engine: client.WorkerEngine) -> None:
    ends: list[asyncio.Future[Any]] = [serving, engine.gone]
    await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
    metrics.ENGINE_UP.set(0)
    if engine.gone.done() and not serving.done():
        raise engine.gone.result()


def _name_requests_in_logs() -> None:
    for handler in logging.getLogger().handlers:
        handler.addFilter(identity.AddRequestId())
        handler.setFormatter(
            logging.Formatter("%(asctime)s %(levelname)s %(name)s [%(request_id)s] %(message)s")
        )
