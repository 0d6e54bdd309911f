"""Keeps the cluster's processes running: starts them, and starts again what dies.

Its children die with it (PR_SET_PDEATHSIG), so that `up` after a kill of the
supervisor finds a clean field. It runs in the cluster's cgroup, and whatever
it starts is in there too: that is how `down` knows what is ours.
"""

import asyncio
import ctypes
import json
import os
import signal
import sys
from pathlib import Path

from local_cluster import cgroup
from local_cluster.components import Component

_PR_SET_PDEATHSIG = 1
_RESTART_SECONDS = 1.0
_STOP_SECONDS = 10.0


class Supervisor:
    """Runs components until SIGTERM."""

    def __init__(self, listed: list[Component], logs: Path) -> None:
        self._components = listed
        self._logs = logs
        self._stopping = asyncio.Event()
        self._running: dict[str, asyncio.subprocess.Process] = {}

    async def run(self) -> None:
        """Run everything, and stop in the opposite order."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._stopping.set)
        tasks = [asyncio.create_task(self._keep(component)) for component in self._components]
        await self._stopping.wait()
        for component in reversed(self._components):
            await self._stop(component.name)
        await asyncio.gather(*tasks)

    async def _keep(self, component: Component) -> None:
        name = component.name
        while not self._stopping.is_set():
            with (self._logs / f"{name}.log").open("ab") as log:
                process = await asyncio.create_subprocess_exec(
                    *component.command,
                    env={**os.environ, **component.environment},
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    preexec_fn=_die_with_parent,
                    start_new_session=True,
                )
            self._running[name] = process
            code = await process.wait()
            if not self._stopping.is_set():
                print(f"{name} ended with {code}; starting it again", flush=True)
                await asyncio.sleep(_RESTART_SECONDS)

    async def _stop(self, name: str) -> None:
        process = self._running.get(name)
        if process is None or process.returncode is not None:
            return
        process.terminate()
        try:
            await asyncio.wait_for(process.wait(), _STOP_SECONDS)
        except TimeoutError:
            process.kill()
            await process.wait()


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def main() -> None:
    """Supervise the components that a file lists."""
    state = Path(sys.argv[1])
    cgroup.join()
    (state / "supervisor.pid").write_text(str(os.getpid()))
    listed = json.loads((state / "components.json").read_text())
    components = [Component(**described) for described in listed]
    asyncio.run(Supervisor(components, state / "logs").run())


if __name__ == "__main__":
    main()
