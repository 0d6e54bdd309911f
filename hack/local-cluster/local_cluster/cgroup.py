"""The cluster's control group: the proof that a process is ours."""

import os
import signal
import time
from pathlib import Path

from local_cluster import layout

_ROOT = Path("/sys/fs/cgroup")
_SYSTEM = "system"
_KILL_SECONDS = 20.0


def join() -> None:
    """Put this process into the cluster's group; what it starts will be there too."""
    for hierarchy in _hierarchies():
        group = hierarchy / layout.CGROUP
        (group / _SYSTEM).mkdir(parents=True, exist_ok=True)
        _inherit_cpuset(hierarchy, group)
        _inherit_cpuset(group, group / _SYSTEM)
    (_tracking() / layout.CGROUP / _SYSTEM / "cgroup.procs").write_text(str(os.getpid()))


def list_processes() -> set[int]:
    """Return the ids of all processes that the cluster has started."""
    found: set[int] = set()
    for file in (_tracking() / layout.CGROUP).rglob("cgroup.procs"):
        found |= {int(line) for line in file.read_text().split()}
    return found


def kill_all() -> None:
    """End every process of the cluster, and remove its groups."""
    deadline = time.monotonic() + _KILL_SECONDS
    while (processes := list_processes()) and time.monotonic() < deadline:
        for process in processes:
            _kill(process)
        time.sleep(0.1)
    for hierarchy in _hierarchies():
        group = hierarchy / layout.CGROUP
        folders = sorted(group.rglob("*/"), key=lambda path: len(path.parts), reverse=True)
        for folder in [*folders, group]:
            if folder.is_dir():
                folder.rmdir()


def _kill(process: int) -> None:
    try:
        os.kill(process, signal.SIGKILL)
    except ProcessLookupError:
        return


def _hierarchies() -> list[Path]:
    """Return every mounted hierarchy: one with version 2, one a controller with version 1."""
    if (_ROOT / "cgroup.controllers").exists():
        return [_ROOT]
    folders = [path for path in _ROOT.iterdir() if path.is_dir() and not path.is_symlink()]
    return [path for path in folders if (path / "cgroup.procs").exists()]


def _tracking() -> Path:
    """Return the hierarchy that processes are looked up in."""
    return _ROOT if (_ROOT / "cgroup.controllers").exists() else _ROOT / "pids"


def _inherit_cpuset(parent: Path, child: Path) -> None:
    """Copy what an empty version 1 cpuset needs before a process may enter it."""
    for name in ("cpuset.cpus", "cpuset.mems"):
        if (child / name).exists() and not (child / name).read_text().strip():
            (child / name).write_text((parent / name).read_text())
