"""How a build stage says how far it is: JSON lines for the operator, a bar for a person.

A line is {"schema": 1, "stage", "step", "done", "total", "unit"}; `done` never
falls within a step, and lines of one step are at least half a second apart.
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

Report = Callable[[int, int], None]
"""Called with units done and units in all."""


class Progress:
    """Reports one stage's steps."""

    def __init__(self, stage: str, output: IO[str] | None = None) -> None:
        self.stage = stage
        self._output = output or sys.stdout

    def step(self, step: str, *, unit: str) -> Report:
        """Begin a step; call what it returns as work gets done."""
        if self._output.isatty():
            return self._bar(step)
        return self._lines(step, unit)

    def _lines(self, step: str, unit: str) -> Report:
        last_time = float("-inf")

        def report(done: int, total: int) -> None:
            nonlocal last_time
            now = time.monotonic()
            if done < total and now - last_time < _INTERVAL_SECONDS:
                return
            last_time = now
            line = {
                "schema": SCHEMA,
                "stage": self.stage,
                "step": step,
                "done": done,
                "total": total,
                "unit": unit,
            }
            print(json.dumps(line), file=self._output, flush=True)

        return report

    def _bar(self, step: str) -> Report:
        bar = rich.progress.Progress(console=rich.console.Console(file=self._output))
        task = bar.add_task(f"{self.stage}: {step}", total=None)
        bar.start()

        def report(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)
            if done >= total:
                bar.stop()

        return report
