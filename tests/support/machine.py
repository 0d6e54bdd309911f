"""What of this machine a cluster could leave behind."""

import json
import subprocess
from pathlib import Path


def snapshot() -> dict[str, set[str]]:
    """Return processes, mounts, links, network namespaces and nftables tables."""
    return {
        "processes": _processes(),
        "mounts": _mounts(),
        "links": {link["ifname"] for link in json.loads(_run("ip", "-json", "link"))},
        "namespaces": set(_run("lsns", "--noheadings", "--type=net", "--output=NS").split()),
        "tables": set(_run("nft", "list", "ruleset").splitlines()),
        "cgroups": {str(path) for path in Path("/sys/fs/cgroup").rglob("internvl*")},
    }


def _mounts() -> set[str]:
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return {line.split()[4] for line in lines}


def _processes() -> set[str]:
    """Return the command lines of daemons: what runs a test comes and goes."""
    names = ("etcd", "kube", "containerd", "coredns", "registry", "provisioner", "device-plugin",
             "local_cluster.supervisor", "runc", "pause")  # fmt: skip
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        program = line.split(" ")[0].rpartition("/")[2]
        if program.startswith(names) or any(name in line.split(" ") for name in names):
            found.add(line)
    return found


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
