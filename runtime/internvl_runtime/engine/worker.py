"""The engine worker: a process that loads an engine and answers over Unix sockets.

The sockets are served by the event loop and a thread for tiles; torch runs in
one thread of its own, which takes messages from a queue between its steps.
"""

import argparse
import asyncio
import concurrent.futures
import contextlib
import json
import logging
import os
import queue
import socket as sockets
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

import msgspec

from internvl_runtime import errors
from internvl_runtime.engine import (
    channel,
    folder,
    grammar,
    interface,
    loading,
    mpi,
    pixels,
    stepping,
    verification,
)
from internvl_runtime.model import prompt

logger = logging.getLogger(__name__)

_HEARTBEAT_SECONDS = 1.0
_COMPILED_AT_ONCE = 2
"""Grammars: each takes up to eight threads while it lasts."""
_FAILED = 1
_MOST_UNSENT = 64
"""Messages that may wait for the server before the engine waits for it."""


class Tiles(msgspec.Struct, frozen=True):
    """A picture that has arrived."""

    content_hash: str
    tiles: channel.Tiles


class Constrained(msgspec.Struct, frozen=True):
    """A request whose grammar has been compiled, or could not be."""

    submit: channel.Submit
    matcher: grammar.Matcher | None
    error: errors.RuntimeBaseError | None


Command = channel.ToWorker | Tiles | Constrained


class Send:
    """Sends messages from the engine's thread through the event loop, and waits when it lags."""

    def __init__(self, loop: asyncio.AbstractEventLoop, writer: asyncio.StreamWriter) -> None:
        self._loop = loop
        self._writer = writer
        self._unsent = threading.Semaphore(_MOST_UNSENT)

    def __call__(self, message: channel.ToServer) -> None:
        """Send one message."""
        self._unsent.acquire()
        asyncio.run_coroutine_threadsafe(self._write(channel.encode(message)), self._loop)

    async def _write(self, data: bytes) -> None:
        try:
            self._writer.write(data)
            await self._writer.drain()
        except ConnectionError:
            # The server is gone: `serve` ends the worker.
            pass
        finally:
            self._unsent.release()


class Worker:
    """Runs an engine on what arrives."""

    def __init__(self, send: Send, *, step_log: TextIO | None = None) -> None:
        self._send = send
        self._step_log = step_log
        self._inbox: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._step_began: float | None = None

    @property
    def step_seconds(self) -> float:
        """For how long the engine has been in the same step."""
        began = self._step_began
        return 0.0 if began is None else time.monotonic() - began

    def put(self, command: Command) -> None:
        """Queue a command; for any thread."""
        self._inbox.put(command)

    def load_picture(self, request_id: str, index: int) -> None:
        """Ask the server for a picture."""
        self._send(channel.LoadPicture(request_id, index))

    def run(self, engine: stepping.Engine) -> None:
        """Answer until `Stop`; runs in a thread of its own."""
        is_waiting = True
        while True:
            for command in self._take(wait=is_waiting):
                if isinstance(command, channel.Stop):
                    return
                _apply(command, engine)
            self._step_began = time.monotonic()
            steps = engine.step()
            self._step_began = None
            is_waiting = not engine.is_busy and not steps
            self._tell(steps, engine)

    def _take(self, *, wait: bool) -> list[Command]:
        """Return what has arrived; waits for something where there is nothing else to do."""
        commands = [self._inbox.get()] if wait else []
        while not self._inbox.empty():
            commands.append(self._inbox.get())
        return commands

    def _tell(self, steps: Sequence[interface.Step], engine: stepping.Engine) -> None:
        reports = tuple(engine.take_reports())
        if self._step_log:
            for report in reports:
                print(json.dumps(msgspec.to_builtins(report)), file=self._step_log, flush=True)
        if steps or reports:
            self._send(channel.Steps(tuple(map(_to_result, steps)), reports))


def _apply(command: Command, engine: stepping.Engine) -> None:
    match command:
        case channel.Submit():
            engine.submit(_to_submitted(command, matcher=None))
        case Constrained(submit, matcher, None):
            engine.submit(_to_submitted(submit, matcher=matcher))
        case Constrained(submit, _, error) if error:
            engine.refuse(submit.request_id, error)
        case channel.Cancel(request_id):
            engine.cancel(request_id)
        case Tiles(content_hash, tiles):
            engine.put_tiles(content_hash, tiles)
        case channel.PictureFailed(content_hash, failure):
            engine.fail_picture(content_hash, channel.error_of(failure))


def _load(
    engine_dir: Path,
    options: loading.Options,
    seat: loading.Seat,
    load_picture: stepping.LoadPicture,
) -> tuple[stepping.Engine, grammar.Compiler]:
    """Load an engine as rank 0 and repeat its recorded answers."""
    opened = folder.open_engine(engine_dir)
    tokens = opened.load_tokenizer()
    engine = loading.load(opened, options=options, seat=seat, load_picture=load_picture)
    with contextlib.ExitStack() as stack:
        stack.callback(engine.close)
        answers = verification.answer(engine, opened.model, tokens)
        verification.check(answers, opened.read_verification(), dtype=opened.dtype)
        stack.pop_all()
    engine.reset()
    mpi.leave(os.environ)
    return engine, grammar.Compiler(tokens, vocab_size=opened.model.language.vocab_size)


async def serve(
    engine_dir: Path,
    socket: Path,
    seat: loading.Seat,
    *,
    options: loading.Options,
    step_log: Path | None,
) -> int:
    """Connect to the server, load, and answer until it says stop or is gone.

    Returns the exit code: mpirun ends the other ranks where it is not 0.
    """
    reader, writer = await asyncio.open_unix_connection(socket)
    writer.write(channel.encode(channel.Joined(seat.rank)))
    loop = asyncio.get_running_loop()
    worker = Worker(Send(loop, writer), step_log=step_log.open("w") if step_log else None)
    with concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="engine") as thread:
        try:
            engine, grammars = await loop.run_in_executor(
                thread, _load, engine_dir, options, seat, worker.load_picture
            )
        except Exception as e:
            # Of several ranks mpirun's notice and this one's log tell.
            if seat.size > 1 and not isinstance(e, errors.StageError):
                raise
            writer.write(channel.encode(_failed(e)))
            await writer.drain()
            return _FAILED
        _start_receiving_tiles(socket, worker)
        writer.write(channel.encode(channel.Ready(channel.VERSION, engine.blocks)))
        running = loop.run_in_executor(thread, worker.run, engine)
        receiving = asyncio.ensure_future(_receive(reader, Desk(worker, grammars)))
        beating = asyncio.ensure_future(_beat(writer, worker, engine))
        await asyncio.wait([running, receiving], return_when=asyncio.FIRST_COMPLETED)
        worker.put(channel.Stop())
        try:
            await running
            if receiving.done():
                receiving.result()
        finally:
            # First of all the server hears of it: a grammar may hold this process a while.
            writer.close()
            receiving.cancel()
            beating.cancel()
        # Of one that failed mpirun ends the other ranks, which would not hear of this.
        await loop.run_in_executor(thread, engine.close)
    return 0


def follow(engine_dir: Path, socket: Path, seat: loading.Seat, *, options: loading.Options) -> int:
    """Be a rank behind rank 0 until that one ends; returns the exit code."""
    with sockets.socket(sockets.AF_UNIX) as connected:
        connected.connect(str(socket))
        connected.sendall(channel.encode(channel.Joined(seat.rank)))
        threading.Thread(
            target=_end_with_server, args=(connected,), name="server", daemon=True
        ).start()
        try:
            loading.follow(folder.open_engine(engine_dir), options=options, seat=seat)
        except errors.StageError as e:
            connected.sendall(channel.encode(_failed(e)))
            return _FAILED
    return 0


def _end_with_server(connected: sockets.socket) -> None:
    """End this process when the server does, which says nothing to ranks but 0."""
    with contextlib.suppress(OSError):
        if not connected.recv(1):
            os._exit(_FAILED)


def _failed(error: Exception) -> channel.Failed:
    if not isinstance(error, errors.StageError):
        logger.error("the engine does not load", exc_info=error)
        error = errors.StageError(
            errors.Reason.CRASH_LOOP,
            f"the engine does not load: {mpi.describe(error)}",
            remedy="read the container's log",
        )
    return channel.Failed(error.reason.value, error.message, error.remedy)


def _start_receiving_tiles(socket: Path, worker: Worker) -> None:
    connected = channel.connect_for_tiles(channel.tiles_path(socket))

    def receive() -> None:
        # The server ends a worker that does not take tiles.
        with connected:
            while received := channel.receive_tiles(connected, pixels.TILE_SHAPE):
                worker.put(Tiles(*received))

    threading.Thread(target=receive, name="tiles", daemon=True).start()


class Desk:
    """Takes the server's messages; grammars are compiled here, beside the engine's steps."""

    def __init__(self, worker: Worker, grammars: grammar.Compiler) -> None:
        self._worker = worker
        self._grammars = grammars
        self._compiling: dict[str, asyncio.Task[None]] = {}
        self._at_once = asyncio.Semaphore(_COMPILED_AT_ONCE)

    def take(self, message: channel.ToWorker) -> None:
        """Pass a message on, a request with a constraint once its grammar is there."""
        match message:
            case channel.Submit(constraint=interface.Constraint()):
                compiling = asyncio.create_task(self._compile(message), name="grammar")
                self._compiling[message.request_id] = compiling
            case channel.Cancel(request_id) if request_id in self._compiling:
                del self._compiling[request_id]
            case _:
                self._worker.put(message)

    async def _compile(self, submit: channel.Submit) -> None:
        matcher = error = None
        try:
            async with self._at_once:
                if submit.constraint and submit.request_id in self._compiling:
                    matcher = await asyncio.to_thread(self._grammars.start, submit.constraint)
        except errors.RuntimeBaseError as e:
            error = e
        except Exception:
            logger.exception("the grammar of %s could not be compiled", submit.request_id)
            error = errors.EngineUnavailableError("this request failed; the server's log says why")
        if self._compiling.pop(submit.request_id, None):
            self._worker.put(Constrained(submit, matcher, error))


async def _receive(reader: asyncio.StreamReader, desk: Desk) -> None:
    while True:
        try:
            message = await channel.read_to_worker(reader)
        except (asyncio.IncompleteReadError, ConnectionError):
            return
        if isinstance(message, channel.Stop):
            return
        desk.take(message)


async def _beat(writer: asyncio.StreamWriter, worker: Worker, engine: stepping.Engine) -> None:
    while True:
        await asyncio.sleep(_HEARTBEAT_SECONDS)
        stalled = max(worker.step_seconds, engine.silent_seconds)
        writer.write(channel.encode(channel.Heartbeat(stalled, engine.load())))


def _to_submitted(submit: channel.Submit, *, matcher: grammar.Matcher | None) -> stepping.Submitted:
    return stepping.Submitted(
        request_id=submit.request_id,
        prompt=prompt.Prompt(submit.token_ids, submit.placements),
        content_hashes=submit.content_hashes,
        sampling=submit.sampling,
        stop_token_ids=submit.stop_token_ids,
        matcher=matcher,
        priority=submit.priority,
    )


def _to_result(step: interface.Step) -> channel.StepResult:
    return channel.StepResult(
        request_id=step.request_id,
        token_ids=step.token_ids,
        log_probabilities=step.log_probabilities,
        finish_reason=step.finish_reason,
        start=step.start,
        failure=channel.failure_of(step.error) if step.error else None,
    )


def main() -> int:
    """Run the worker, or one rank of it; the server starts it."""
    parser = argparse.ArgumentParser(prog="internvl-engine-worker")
    parser.add_argument("--engine", type=Path, required=True)
    parser.add_argument("--socket", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--kv-cache-bytes", type=int, required=True)
    parser.add_argument("--picture-cache-bytes", type=int, required=True)
    parser.add_argument("--step-log", type=Path)
    arguments = parser.parse_args()
    seat = loading.take_seat(arguments.socket.parent, threads=arguments.threads)
    options = loading.Options(
        kv_cache_bytes=arguments.kv_cache_bytes,
        picture_cache_bytes=arguments.picture_cache_bytes,
    )
    engine, socket = arguments.engine, arguments.socket
    if seat.rank:
        return follow(engine, socket, seat, options=options)
    return asyncio.run(serve(engine, socket, seat, options=options, step_log=arguments.step_log))


if __name__ == "__main__":
    mpi.end_with(main)
