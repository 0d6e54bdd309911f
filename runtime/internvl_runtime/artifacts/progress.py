"""How a build stage says how far it is: JSON lines for the operator, a bar for a person.

A line is {"schema": 1, "stage", "step", "done", "total", "unit", "percent"} and,
once they are known, "rate" (units a second) and "remainingSeconds" (of the
step). `done` and `percent`, which is over all steps of the stage, never fall;
lines of one step are at least half a second apart.
"""

import json
import sys
import time
from collections.abc import Callable
from typing import IO

import rich.console
import rich.progress

SCHEMA = 1
_INTERVAL_SECONDS = 0.5
_KNOWN_AFTER_SECONDS = 2.0
"""A rate of less says nothing of what is to come."""
_SHARES = {
    "resolve": {"hash": 1.0},
    "fetch": {"hash": 0.5, "synthesize": 0.5, "download": 0.5},
    "convert": {"convert": 1.0},
    "build": {"vision": 0.2, "language": 0.5, "kernels": 0.7, "answer": 0.1, "compare": 0.2},
}
"""About how much of a stage's time a step takes, in the order of the steps; a stage has some."""

Report = Callable[[int, int], None]
"""Called with units done and units in all."""


class Progress:
    """Reports one stage's steps."""

    def __init__(self, stage: str, output: IO[str] | None = None) -> None:
        self.stage = stage
        self._output = output or sys.stdout
        self._shares = dict(_SHARES.get(stage, {}))
        self._percent = 0.0

    def step(self, step: str, *, unit: str) -> Report:
        """Begin a step; call what it returns as work gets done."""
        if self._output.isatty():
            return self._bar(step, unit)
        return self._lines(step, unit)

    def _lines(self, step: str, unit: str) -> Report:
        last_time = float("-inf")
        pace = _Pace(unit)
        begun_at, span = self._begin(step)

        def report(done: int, total: int) -> None:
            nonlocal last_time
            now = time.monotonic()
            pace.add(done, total, now)
            if done < total and now - last_time < _INTERVAL_SECONDS:
                return
            last_time = now
            self._percent = max(self._percent, begun_at + span * (done / total if total else 1.0))
            line = {
                "schema": SCHEMA,
                "stage": self.stage,
                "step": step,
                "done": done,
                "total": total,
                "unit": unit,
                "percent": round(self._percent, 1),
                **pace.known(),
            }
            print(json.dumps(line), file=self._output, flush=True)

        return report

    def _begin(self, step: str) -> tuple[float, float]:
        """Return where the stage is, and how many percent of it this step is."""
        left = sum(self._shares.values())
        own = self._shares.get(step, left)
        names = list(self._shares)
        # Steps before this one are over, or not needed here.
        for name in names[: names.index(step) + 1] if step in names else names:
            del self._shares[name]
        ahead = own + sum(self._shares.values())
        span = (100.0 - self._percent) * (own / ahead if ahead else 1.0)
        return self._percent, span

    def _bar(self, step: str, unit: str) -> Report:
        speed = [rich.progress.TransferSpeedColumn()] if unit == "bytes" else []
        columns = (*rich.progress.Progress.get_default_columns(), *speed)
        bar = rich.progress.Progress(*columns, console=rich.console.Console(file=self._output))
        task = bar.add_task(f"{self.stage}: {step}", total=None)
        bar.start()

        def report(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)
            if done >= total:
                bar.stop()

        return report


class _Pace:
    """Tells how fast a step is, where its units are alike."""

    def __init__(self, unit: str) -> None:
        self._is_even = unit == "bytes"
        self._first: tuple[float, int] | None = None
        self._latest = (0.0, 0, 0)

    def add(self, done: int, total: int, now: float) -> None:
        """Take in how far the step is."""
        self._first = self._first or (now, done)
        self._latest = now, done, total

    def known(self) -> dict[str, float]:
        """Return rate and remaining seconds, or nothing."""
        now, done, total = self._latest
        began, before = self._first or (now, done)
        if not self._is_even or now - began < _KNOWN_AFTER_SECONDS or done <= before:
            return {}
        rate = (done - before) / (now - began)
        return {"rate": round(rate), "remainingSeconds": round((total - done) / rate)}
