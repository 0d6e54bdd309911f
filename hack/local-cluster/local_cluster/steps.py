"""Shows what is being done and how long it has taken."""

import contextlib
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import rich.console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from local_cluster import layout

console = rich.console.Console(highlight=False)
_TAIL_LINES = 25


class ClusterError(Exception):
    """Raised when the cluster can not be brought up; its text says what to do."""


@contextlib.contextmanager
def step(words: str) -> Iterator[None]:
    """Show a step with its elapsed time; off a terminal, its beginning and its end."""
    started = time.monotonic()
    if not console.is_terminal:
        console.print(f"  … {words}", markup=False)
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        bar.add_task(words)
        yield
    elapsed = time.monotonic() - started
    console.print(f"  ✓ {words} {elapsed:.1f} s", markup=False, style="green")


def run(
    command: Sequence[str | Path],
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    input_text: str | None = None,
) -> str:
    """Run a command quietly; raises ClusterError with the end of its output when it fails."""
    done = subprocess.run(
        [str(part) for part in command],
        env={**(env or os.environ), "NO_PROXY": _without_proxy(), "no_proxy": _without_proxy()},
        cwd=cwd,
        input=input_text,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    if done.returncode:
        tail = "\n".join(done.stdout.splitlines()[-_TAIL_LINES:])
        words = " ".join(map(str, command))
        raise ClusterError(f"{words}\nended with exit code {done.returncode}:\n{tail}")
    return done.stdout


def show_error(error: ClusterError) -> None:
    """Print an error as it is."""
    console.print(f"✗ {error}", markup=False, style="red", soft_wrap=True)


def _without_proxy() -> str:
    """Return the addresses that no proxy can reach, with those of the user."""
    ours = f"127.0.0.1,localhost,{layout.TEST_NETWORK},{layout.NODE_ADDRESS}"
    return ",".join(filter(None, [os.environ.get("NO_PROXY", ""), ours]))


def wait_for(words: str, check: Callable[[], bool], *, seconds: float, hint: str) -> None:
    """Wait until a check holds; raises ClusterError with the hint when it does not."""
    deadline = time.monotonic() + seconds
    while not check():
        if time.monotonic() > deadline:
            raise ClusterError(f"{words}: not within {seconds:.0f} s; {hint}")
        time.sleep(0.2)


class Check:
    """Something that holds or not; any error counts as not."""

    def __init__(self, command: Sequence[str | Path], *, expects: str = "") -> None:
        self._command = command
        self._expects = expects

    def __call__(self) -> bool:
        """Whether the command succeeds and prints what is expected."""
        try:
            return self._expects in run(self._command)
        except (ClusterError, OSError):
            return False
