"""The processes of a running engine, by what the kernel tells of them."""

import contextlib
import itertools
import tempfile
import time
from pathlib import Path

MPIRUN = "mpirun"
WORKER, BUILDER = b"engine.worker", b"artifacts.answering"
"""What the ranks of a server run, and those of a build."""


def of(engine, program=WORKER):
    """Return process ids by rank, and mpirun's; those that have ended are none."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command = (folder / "cmdline").read_bytes()
            if str(engine).encode() not in command or program not in command:
                continue
            environment = (folder / "environ").read_bytes().split(b"\0")
            ranks = [each for each in environment if each.startswith(b"OMPI_COMM_WORLD_RANK=")]
            name = int(ranks[0].partition(b"=")[2]) if ranks else MPIRUN
            found[name] = int(folder.name)
    return found


def wait_for(engine, name, *, program=WORKER, seconds=60):
    """Return the process id of a rank, or of mpirun, once it is there."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if name in (found := of(engine, program)):
            return found[name]
        time.sleep(0.02)
    raise AssertionError(f"{name} did not start")


def parent_of(process):
    """Return the id of the process that has started one."""
    _, _, rest = Path(f"/proc/{process}/stat").read_text().rpartition(")")
    return int(rest.split()[1])


def left_behind():
    """Return what ranks may leave: files in shared memory and in the temporary folder."""
    temporary = Path(tempfile.gettempdir())
    left = [temporary.glob(name) for name in ("ompi.*", "prte.*", "pmix*", "internvl-*")]
    return set(map(str, itertools.chain(Path("/dev/shm").iterdir(), *left)))
