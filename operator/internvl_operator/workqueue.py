"""A queue of keys: each is worked on by one worker at a time, and again if it came meanwhile."""

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

from internvl_operator import errors, metrics

logger = logging.getLogger(__name__)

_FIRST_BACKOFF_SECONDS = 1.0
_LAST_BACKOFF_SECONDS = 300.0
_RESYNC_SECONDS = 600.0
_RESYNC_JITTER = 0.1

K = TypeVar("K")

Work = Callable[[K], Awaitable[float | None]]
"""Works on a key; returns after how many seconds to look again, None for the resync."""


class WorkQueue(Generic[K]):
    """Runs `work` for every key that is added; a failure is tried again, ever more slowly."""

    def __init__(self, work: Work[K]) -> None:
        self._work = work
        self._ready: asyncio.Queue[K] = asyncio.Queue()
        self._waiting: set[K] = set()
        self._running: set[K] = set()
        self._again: set[K] = set()
        self._gone: set[K] = set()
        self._failures: dict[K, int] = {}
        self._timers: dict[K, asyncio.TimerHandle] = {}

    def add(self, key: K) -> None:
        """Ask for work on a key; many calls before it begins are one."""
        self._gone.discard(key)
        if key in self._running:
            self._again.add(key)
        elif key not in self._waiting:
            self._waiting.add(key)
            self._ready.put_nowait(key)
            metrics.QUEUE_DEPTH.set(self._ready.qsize())

    def forget(self, key: K) -> None:
        """Drop a key that is gone: it comes back only when it is added again."""
        if key in self._running:
            self._gone.add(key)
        self._failures.pop(key, None)
        timer = self._timers.pop(key, None)
        if timer:
            timer.cancel()

    async def run(self, workers: int) -> None:
        """Work until cancelled."""
        async with asyncio.TaskGroup() as group:
            for number in range(workers):
                group.create_task(self._run_worker(), name=f"reconcile-{number}")

    async def _run_worker(self) -> None:
        while True:
            key = await self._ready.get()
            metrics.QUEUE_DEPTH.set(self._ready.qsize())
            self._waiting.discard(key)
            self._running.add(key)
            delay = await self._work_on(key)
            self._running.discard(key)
            if key in self._gone:
                self._gone.discard(key)
                self._again.discard(key)
            elif key in self._again:
                self._again.discard(key)
                self.add(key)
            else:
                self._schedule(key, delay)

    async def _work_on(self, key: K) -> float:
        started = time.monotonic()
        try:
            delay = await self._work(key)
        except errors.KubeConflictError as e:
            logger.info("reconciling %s again: %s", key, e)
            delay = _FIRST_BACKOFF_SECONDS
        except Exception:
            failures = self._failures[key] = self._failures.get(key, 0) + 1
            delay = backoff_seconds(failures)
            metrics.RECONCILES.labels("failed").inc()
            logger.exception("reconciling %s failed; next try in %.0f s", key, delay)
        else:
            self._failures.pop(key, None)
            metrics.RECONCILES.labels("done").inc()
        metrics.RECONCILE_SECONDS.observe(time.monotonic() - started)
        if delay is not None:
            return delay
        spread: float = random.uniform(1 - _RESYNC_JITTER, 1 + _RESYNC_JITTER)  # noqa: S311
        return _RESYNC_SECONDS * spread

    def _schedule(self, key: K, delay: float) -> None:
        earlier = self._timers.pop(key, None)
        if earlier:
            earlier.cancel()
        self._timers[key] = asyncio.get_running_loop().call_later(delay, self.add, key)


def backoff_seconds(failures: int) -> float:
    """Return the pause after so many failures in a row: doubling, jittered, bounded."""
    longest = min(_FIRST_BACKOFF_SECONDS * 2.0 ** (failures - 1), _LAST_BACKOFF_SECONDS)
    return longest * random.uniform(0.5, 1.0)  # noqa: S311 - spreads load, keeps no secret
