"""The local cluster itself: it comes, survives, and leaves nothing behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import machine
import pytest
from local_cluster import cgroup, cluster, layout, steps

pytestmark = pytest.mark.skipif(
    os.environ.get("CLUSTER") == "current", reason="not the local cluster"
)
WHERE = layout.default_layout()
NO_GPUS = cluster.Gpus()


def pids_of(name):
    return [pid for command, pid in cluster._running_commands().items() if name in command[0]]


@pytest.mark.ci
def test_down_leaves_the_machine_as_it_was_before_up():
    cluster.down(WHERE, purge=False)
    before = machine.snapshot()

    cluster.up(WHERE, NO_GPUS)
    during = machine.snapshot()
    cluster.down(WHERE, purge=False)

    assert during["links"] > before["links"]
    assert during["processes"] > before["processes"]
    assert machine.snapshot() == before
    assert (
        not (Path.home() / ".kube" / "config").exists()
        or "internvl-local" not in (Path.home() / ".kube" / "config").read_text()
    )


@pytest.mark.ci
def test_up_repairs_what_was_killed():
    cluster.up(WHERE, NO_GPUS)
    supervisor = int((WHERE.state / "supervisor.pid").read_text())
    os.kill(supervisor, signal.SIGKILL)
    cluster.up(WHERE, NO_GPUS)

    assert cluster.status(WHERE)


@pytest.mark.parametrize(
    "seconds",
    [
        pytest.param(1.5, marks=pytest.mark.ci),
        *(pytest.param(s, marks=pytest.mark.long) for s in (0.3, 0.7, 3, 5, 8)),
    ],
)
def test_up_completes_what_an_interrupted_up_began(seconds):
    cluster.down(WHERE, purge=False)
    command = [sys.executable, "-m", "local_cluster", "up"]
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(layout.SOURCES)}) as up:
        time.sleep(seconds)
        up.kill()

    cluster.up(WHERE, NO_GPUS)

    assert cluster.status(WHERE)


@pytest.mark.long
@pytest.mark.parametrize(
    "name",
    [
        "etcd", "kube-apiserver", "containerd", "docker-registry", "kube-controller-manager",
        "kube-scheduler", "kubelet", "kube-proxy", "coredns", "provisioner",
    ],
)  # fmt: skip
def test_a_killed_process_comes_back(name):
    cluster.up(WHERE, NO_GPUS)
    (pid,) = [p for p in pids_of(name) if p in cgroup.list_processes()][:1]
    os.kill(pid, signal.SIGKILL)

    steps.wait_for(name, lambda: pid not in pids_of(name) and pids_of(name), seconds=30, hint=name)
    cluster.up(WHERE, NO_GPUS)

    assert cluster.status(WHERE)


@pytest.mark.ci
def test_fake_gpus_are_counted_labelled_and_can_be_ill():
    cluster.up(WHERE, cluster.Gpus(2, "NVIDIA-H200"))

    def node():
        return json.loads(cluster.kubectl(WHERE, "get", "node", layout.NODE_NAME, "-o", "json"))

    def allocatable(count):
        return lambda: node()["status"]["allocatable"].get("nvidia.com/gpu") == count

    steps.wait_for("two GPUs", allocatable("2"), seconds=60, hint="device-plugin.log")
    assert node()["metadata"]["labels"]["nvidia.com/gpu.product"] == "NVIDIA-H200"

    (WHERE.state / "unhealthy-gpus").write_text("fake-gpu-1\n")
    steps.wait_for("one GPU", allocatable("1"), seconds=60, hint="device-plugin.log")
    (WHERE.state / "unhealthy-gpus").unlink()
    steps.wait_for("two GPUs", allocatable("2"), seconds=60, hint="device-plugin.log")

    cluster.up(WHERE, NO_GPUS)
    assert "nvidia.com/gpu.product" not in node()["metadata"]["labels"]


@pytest.mark.ci
def test_a_non_root_pod_with_a_read_only_root_writes_to_a_claim(client):
    client.apply_claim("data")

    phase, log = client.run_pod(
        "writer", ["sh", "-c", "echo kept > /data/file && cat /data/file && id -u"], claim="data"
    )

    assert (phase, log) == ("Succeeded", "kept\n10001\n")


@pytest.mark.ci
def test_a_sized_claim_is_really_full_when_it_is(client):
    client.apply_claim("small", size="32Mi", storage_class="local-sized")

    phase, log = client.run_pod(
        "filler", ["sh", "-c", "head -c 64M /dev/zero > /data/file"], claim="small"
    )

    assert phase == "Failed"
    assert "No space left on device" in log


@pytest.mark.ci
def test_the_namespaces_of_the_tests_enforce_the_restricted_profile(client):
    root = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "root"},
        "spec": {"containers": [{"name": "main", "image": client.images["internvl-runtime"]}]},
    }
    with pytest.raises(steps.ClusterError, match="violates PodSecurity"):
        client.apply(root)
