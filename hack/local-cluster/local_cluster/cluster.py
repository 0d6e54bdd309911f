"""`up`, `down` and `status`."""

import contextlib
import dataclasses
import fcntl
import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import rich.table

from local_cluster import cgroup, components, images, layout, network, pki, steps, tools

_DEVICE_PLUGINS = Path("/var/lib/kubelet/device-plugins")
_CONTAINER_LOGS = Path("/var/log/containers")
_READY_SECONDS = 120.0
_STOP_SECONDS = 60.0
_REMOVAL_ATTEMPTS = 10


@dataclasses.dataclass(frozen=True)
class Gpus:
    """The fake GPUs of the node."""

    count: int = 0
    product: str = "NVIDIA-H200"


@contextlib.contextmanager
def locked(where: layout.Layout) -> Iterator[None]:
    """Let one `up` or `down` run at a time; another waits."""
    where.root.mkdir(parents=True, exist_ok=True)
    with (where.root / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def up(where: layout.Layout, gpus: Gpus) -> None:
    """Bring the cluster up, whatever state it is in."""
    with locked(where):
        _up(where, gpus)


def down(where: layout.Layout, *, purge: bool) -> None:
    """Take the cluster down; only processes, mounts and links that it made are touched."""
    with locked(where):
        _down(where)
        shutil.rmtree(where.root if purge else where.state, ignore_errors=True)


def _up(where: layout.Layout, gpus: Gpus) -> None:
    started = time.monotonic()
    images.check_disk(where)
    tools.ensure_tools(where)
    _prepare_state(where)
    if not _is_supervised(where, gpus):
        _start(where, gpus)
    _wait_until_ready(where)
    images.ensure_pause(where)
    _apply_manifests(where, gpus)
    elapsed = time.monotonic() - started
    steps.console.print(f"the cluster is up after {elapsed:.0f} s")
    steps.console.print(f"export KUBECONFIG={where.kubeconfig}", style="bold")


def _down(where: layout.Layout) -> None:
    if not where.state.exists():
        return
    with steps.step("stop the pods"):
        _remove_containers(where)
    with steps.step("stop the processes"):
        _stop_supervisor(where)
        cgroup.kill_all()
    with steps.step("remove mounts, links and tables"):
        _unmount_below(where.root)
        network.remove_network(where)
        _remove_leftovers()
    where.kubeconfig.unlink(missing_ok=True)


def status(where: layout.Layout) -> bool:
    """Show the processes and the node; returns whether all is well."""
    table = rich.table.Table("process", "state", "log")
    is_running = _supervisor_pid(where) is not None
    listed = where.state / "components.json"
    alive = _running_commands()
    for component in json.loads(listed.read_text()) if listed.exists() else []:
        is_alive = tuple(component["command"]) in alive
        state = "[green]running[/]" if is_alive else "[red]down[/]"
        table.add_row(component["name"], state, str(where.logs / f"{component['name']}.log"))
        is_running = is_running and is_alive
    steps.console.print(table)
    if is_running:
        steps.console.print(kubectl(where, "get", "nodes", "-o", "wide"))
    else:
        steps.console.print("the cluster is not up: make cluster-up")
    return is_running


def kubectl(where: layout.Layout, *arguments: str) -> str:
    """Run kubectl as the administrator."""
    return steps.run([where.tool("kubectl"), f"--kubeconfig={where.kubeconfig}", *arguments])


def _prepare_state(where: layout.Layout) -> None:
    with steps.step("prepare network, certificates and configuration"):
        where.state.mkdir(parents=True, exist_ok=True)
        network.ensure_network(where)
        pki.ensure_pki(where)
        components.write_configuration(where)


def _is_supervised(where: layout.Layout, gpus: Gpus) -> bool:
    listed = where.state / "components.json"
    is_same = listed.exists() and listed.read_text() == _listing(where, gpus)
    return is_same and _supervisor_pid(where) is not None


def _start(where: layout.Layout, gpus: Gpus) -> None:
    _stop_supervisor(where)
    if cgroup.list_processes():
        with steps.step("end what an interrupted run has left"):
            cgroup.kill_all()
            _unmount_below(where.state / "containerd")
    with steps.step("remove old images"):
        images.prune(where)
    with steps.step("start the processes"):
        (where.state / "components.json").write_text(_listing(where, gpus))
        with (where.logs / "supervisor.log").open("ab") as log:
            subprocess.run(
                ["setsid", "--fork", sys.executable, "-m", "local_cluster.supervisor", where.state],
                cwd=layout.SOURCES,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "PYTHONPATH": str(layout.SOURCES)},
                check=True,
            )


def _listing(where: layout.Layout, gpus: Gpus) -> str:
    listed = components.list_components(where, gpus=gpus.count)
    return json.dumps([dataclasses.asdict(component) for component in listed], indent=2)


def _wait_until_ready(where: layout.Layout) -> None:
    hint = f"the logs are in {where.logs}"
    admin: list[str | Path] = [where.tool("kubectl"), f"--kubeconfig={where.kubeconfig}"]
    with steps.step("wait for the API server"):
        check = steps.Check([*admin, "get", "--raw=/readyz"], expects="ok")
        steps.wait_for("API server", check, seconds=_READY_SECONDS, hint=hint)
    with steps.step("wait for the registry"):
        answers = functools.partial(images.is_answering, f"http://{layout.REGISTRY}/v2/")
        steps.wait_for("registry", answers, seconds=_READY_SECONDS, hint=hint)
    with steps.step("wait for the node"):
        path = "jsonpath={.status.conditions[?(@.type=='Ready')].status}"
        check = steps.Check([*admin, "get", "node", layout.NODE_NAME, "-o", path], expects="True")
        steps.wait_for("node", check, seconds=_READY_SECONDS, hint=hint)


def _apply_manifests(where: layout.Layout, gpus: Gpus) -> None:
    with steps.step("apply roles and storage classes"):
        manifests = layout.SOURCES / "files" / "manifests.yaml"
        kubectl(where, "apply", "--server-side", f"--filename={manifests}")
        labels = _gpu_labels(gpus)
        kubectl(where, "label", "--overwrite", "node", layout.NODE_NAME, *labels)
    with steps.step("wait for DNS"):
        check = functools.partial(images.is_answering, f"http://{layout.NODE_ADDRESS}:8181/ready")
        hint = f"the logs are in {where.logs}"
        steps.wait_for("DNS", check, seconds=_READY_SECONDS, hint=hint)


def _gpu_labels(gpus: Gpus) -> list[str]:
    """Return the labels that GPU feature discovery would set; `-` removes one."""
    if not gpus.count:
        return ["nvidia.com/gpu.product-", "nvidia.com/gpu.count-", "nvidia.com/gpu.present-"]
    return [
        f"nvidia.com/gpu.product={gpus.product}",
        f"nvidia.com/gpu.count={gpus.count}",
        "nvidia.com/gpu.present=true",
    ]


def _supervisor_pid(where: layout.Layout) -> int | None:
    """Return the supervisor's process id if it runs and is ours."""
    file = where.state / "supervisor.pid"
    pid = int(file.read_text()) if file.exists() else 0
    return pid if pid and pid in cgroup.list_processes() else None


def _stop_supervisor(where: layout.Layout) -> None:
    pid = _supervisor_pid(where)
    if pid is None:
        return
    os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + _STOP_SECONDS
    while _supervisor_pid(where) is not None and time.monotonic() < deadline:
        time.sleep(0.1)


def _remove_containers(where: layout.Layout) -> None:
    """Remove pods from containerd's records, so that the next cluster does not find them."""
    if _supervisor_pid(where) is None:
        return
    kubelet = str(where.tool("kubelet"))
    pids = [pid for command, pid in _running_commands().items() if command[0] == kubelet]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        for _ in range(_REMOVAL_ATTEMPTS):
            if _try_to_remove_containers(where):
                return
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


def _try_to_remove_containers(where: layout.Layout) -> bool:
    """Remove what can be removed; containerd refuses while a shim is still ending."""
    ctr: list[str | Path] = [
        where.tool("ctr"),
        f"--address={where.containerd_socket}",
        "--namespace=k8s.io",
    ]
    try:
        tasks = steps.run([*ctr, "tasks", "ls", "--quiet"]).split()
        containers = steps.run([*ctr, "containers", "ls", "--quiet"]).split()
    except steps.ClusterError:
        return True
    for command in ("tasks rm --force", "containers rm"):
        names = tasks if command.startswith("tasks") else containers
        for name in names:
            with contextlib.suppress(steps.ClusterError):
                steps.run([*ctr, *command.split(), name])
    return not containers


def _running_commands() -> dict[tuple[str, ...], int]:
    found = {}
    for pid in cgroup.list_processes():
        try:
            line = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue
        found[tuple(line.decode().rstrip("\0").split("\0"))] = pid
    return found


def _unmount_below(folder: Path) -> None:
    mounts = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    for mount in reversed(mounts):
        if Path(mount).is_relative_to(folder):
            steps.run(["umount", "--lazy", mount])


def _remove_leftovers() -> None:
    """Remove the few files that kubelet and containerd write outside their folders."""
    if _DEVICE_PLUGINS.is_dir() and not _is_listening(_DEVICE_PLUGINS / "kubelet.sock"):
        shutil.rmtree(_DEVICE_PLUGINS)
    for link in _CONTAINER_LOGS.glob("*") if _CONTAINER_LOGS.is_dir() else ():
        if link.is_symlink() and not link.exists():
            link.unlink()


def _is_listening(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(str(path)) == 0
