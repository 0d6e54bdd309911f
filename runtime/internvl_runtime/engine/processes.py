"""The engine worker's processes as the server sees them: one, or mpirun and its ranks.

Every rank connects to the server's socket and keeps the connection: a rank that can not
load says why, and the end of one is known at once. Which one it was is mpirun's word: the
others wait for it to end them.
"""

import asyncio
import contextlib
import logging
import os
import sys
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeVar

from internvl_runtime import errors
from internvl_runtime.engine import channel, mpi

logger = logging.getLogger(__name__)

_KILL_SECONDS = 3.0
"""How long mpirun may take to end its ranks."""
_NOTICE_SECONDS = 6.0
"""How long mpirun may take to say which rank has ended, once one has."""
_MOST_SOCKET_PATH = 107
"""Bytes, by unix(7)."""
_LAST_BYTES = 8192
"""Of the log: mpirun's notice is at its end."""

_REMEDY = "read the container's log; out of memory is the usual cause"

_R = TypeVar("_R")
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Processes:
    """Starts the worker and tells when one of its processes has ended unasked."""

    def __init__(self, ranks: int, *, speak_mpi: bool) -> None:
        """Raise StageError where there is no place for their sockets."""
        loop = asyncio.get_running_loop()
        self.failed: asyncio.Future[errors.StageError] = loop.create_future()
        """Why, once there is no worker any more."""
        self._ranks = ranks
        self._leader: asyncio.Future[Streams] = loop.create_future()
        self._doing = "loading"
        self._is_stopping = False
        self._server: asyncio.Server | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._said = b""
        self._tasks: set[asyncio.Task[None]] = set()
        with contextlib.ExitStack() as folders:
            folder, self._environment = _create_folder(folders, speak_mpi=speak_mpi)
            self.socket = folder / "engine.sock"
            """Where the ranks meet, and the server."""
            _check_length(channel.tiles_path(self.socket))
            self._folders = folders.pop_all()

    def name(self, rank: int, message: str) -> str:
        """Return a rank's words as those of this one among several."""
        return f"rank {rank} of {self._ranks}: {message}" if self._ranks > 1 else message

    async def start(self, arguments: Sequence[str]) -> Streams:
        """Start the worker; returns rank 0's connection, once it is there."""
        self._server = await asyncio.start_unix_server(self._join, self.socket)
        await self._spawn([*arguments, f"--socket={self.socket}"])
        return await self._leader

    async def unless_failed(self, starting: Coroutine[Any, Any, _R], *, seconds: float) -> _R:
        """Wait for a result; raises StageError when a process ends before, or it takes longer."""
        wanted = asyncio.create_task(starting, name="engine-start")
        ends: list[asyncio.Future[Any]] = [wanted, self.failed]
        try:
            await asyncio.wait(ends, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if wanted.done():
                result = wanted.result()
                if not self.failed.done():
                    return result
        finally:
            wanted.cancel()
        self.fail(
            f"the engine worker was not ready within {seconds:g} s",
            setting="INTERNVL_RUNTIME_WORKER_START_SECONDS",
        )
        raise self.failed.result()

    def be_serving(self) -> None:
        """Call what ends from now on an end while serving."""
        self._doing = "serving"

    def lose(self) -> None:
        """Take in that a rank's connection has ended."""
        if self._ranks == 1:
            self.fail(f"the engine worker ended while {self._doing}")
        else:
            self._begin(self._wait_for_mpirun(), "engine-lost")

    def fail(self, why: str, *, setting: str | None = None) -> None:
        """Give the worker up, for the limit of a setting perhaps; only the first call counts."""
        self._fail(self._error(why, setting))

    async def stop(self, *, seconds: float) -> None:
        """Wait for the end of a worker that was told to end, and end it when it does not."""
        self._is_stopping = True
        if self._process is not None and not await self._has_ended(
            _KILL_SECONDS if self.failed.done() else seconds
        ):
            logger.warning("the engine worker did not end by itself")
            await self._kill(self._process)
        if self._server:
            self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._folders.close()

    async def _spawn(self, arguments: Sequence[str]) -> None:
        program = [sys.executable, "-m", "internvl_runtime.engine.worker", *arguments]
        self._process = await asyncio.create_subprocess_exec(
            *mpi.command(self._ranks, program),
            env=self._environment,
            stdin=asyncio.subprocess.DEVNULL,
            stderr=None if self._ranks == 1 else asyncio.subprocess.PIPE,
            # What a terminal's Ctrl-C ends is the server, after its answers.
            start_new_session=True,
        )
        self._begin(self._watch(self._process), "engine-process")

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Take a rank's connection."""
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            match await channel.read_to_server(reader):
                case channel.Joined(0) if not self._leader.done():
                    self._leader.set_result((reader, writer))
                case channel.Joined(rank):
                    self._begin(self._listen(rank, reader, writer), f"rank-{rank}")

    async def _listen(
        self, rank: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Wait for the end of a rank that has nothing to say but that it can not load."""
        try:
            match await channel.read_to_server(reader):
                case channel.Failed(reason, message, remedy):
                    told = self.name(rank, message)
                    self._fail(errors.StageError(errors.Reason(reason), told, remedy=remedy))
        except (asyncio.IncompleteReadError, ConnectionError):
            self.lose()
        finally:
            writer.close()

    async def _wait_for_mpirun(self) -> None:
        """Give mpirun the time to end all and to say why."""
        if not await self._has_ended(_NOTICE_SECONDS):
            self.fail(f"a rank ended while {self._doing}, and mpirun went on")

    async def _watch(self, process: asyncio.subprocess.Process) -> None:
        """Pass on what ranks and mpirun say, and wait for their end."""
        if process.stderr:
            while said := await process.stderr.read(_LAST_BYTES):
                sys.stderr.buffer.write(said)
                sys.stderr.buffer.flush()
                self._said = (self._said + said)[-_LAST_BYTES:]
        await process.wait()
        if self._ranks > 1:
            last = self._said.decode(errors="replace")
            self.fail(
                mpi.describe_end(last, process.returncode, ranks=self._ranks, doing=self._doing)
            )
        elif not self._leader.done():
            # What it says last is read to the end of its connection, where there is one.
            self.lose()

    def _fail(self, error: errors.StageError) -> None:
        if not self.failed.done() and not self._is_stopping:
            self.failed.set_result(error)

    async def _has_ended(self, seconds: float) -> bool:
        if self._process is None:
            return True
        try:
            await asyncio.wait_for(self._process.wait(), seconds)
        except TimeoutError:
            return False
        return True

    async def _kill(self, process: asyncio.subprocess.Process) -> None:
        """End the process; mpirun may end its ranks first."""
        if self._ranks > 1:
            process.terminate()
            if await self._has_ended(_KILL_SECONDS):
                return
        process.kill()
        await process.wait()

    def _error(self, why: str, setting: str | None) -> errors.StageError:
        limit = f"; {setting} is the limit" if setting else ""
        if self._ranks > 1:
            return mpi.failure(why, limit=limit)
        return errors.StageError(errors.Reason.CRASH_LOOP, why, remedy=_REMEDY + limit)

    def _begin(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _create_folder(
    folders: contextlib.ExitStack, *, speak_mpi: bool
) -> tuple[Path, dict[str, str]]:
    """Return where the worker and the server meet, and the worker's environment."""
    if speak_mpi:
        return folders.enter_context(mpi.meeting(os.environ))
    folder = folders.enter_context(mpi.create_folder())
    return Path(folder), mpi.environment(os.environ)


def _check_length(socket: Path) -> None:
    if len(os.fsencode(socket)) > _MOST_SOCKET_PATH:
        raise errors.StageError(
            errors.Reason.CRASH_LOOP,
            f"the path of a socket may have {_MOST_SOCKET_PATH} bytes, {socket} has more",
            remedy="name a folder with a shorter path in TMPDIR",
        )
