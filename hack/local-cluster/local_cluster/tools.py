"""Brings the programs: Debian packages, and binaries built from Go modules."""

import os
import shutil
import subprocess
from pathlib import Path

from local_cluster import layout, steps

_COMMANDS = {
    "buildah": "buildah",
    "debootstrap": "debootstrap",
    "nft": "nftables",
    "conntrack": "conntrack",
    "ip": "iproute2",
    "mkfs.ext4": "e2fsprogs",
}
"""Commands that are installed by their package where they are missing."""

_UNPACKED = ("containerd", "runc", "containernetworking-plugins", "docker-registry", "etcd-server")
"""Packages that would install and start services: they are unpacked privately instead."""

_VERSION_FLAGS = (
    f"-X k8s.io/component-base/version.gitVersion={layout.KUBERNETES_VERSION}"
    " -X k8s.io/component-base/version.gitMajor=1"
    f" -X k8s.io/component-base/version.gitMinor={layout.KUBERNETES_VERSION.split('.')[1]}"
)
_MODULES = {
    "kubernetes": ("tool", "kube-apiserver"),
    "addons": ("./cmd/...", "provisioner"),
    "coredns": (".", "coredns"),
    "helm": ("tool", "helm"),
}
"""For each Go module what to build, and one binary that proves that it was built."""


def ensure_tools(where: layout.Layout) -> None:
    """Install, unpack and build what is missing."""
    _require_root()
    _install_missing()
    _unpack_packages(where)
    for module in _MODULES:
        _build_module(where, module)


def _require_root() -> None:
    if os.geteuid() != 0:
        raise steps.ClusterError("the local cluster needs root: run it with sudo, or as root")


def _install_missing() -> None:
    missing = {package for command, package in _COMMANDS.items() if not shutil.which(command)}
    if not missing:
        return
    if not shutil.which("apt-get"):
        raise steps.ClusterError(
            f"these packages are missing, and there is no apt-get: {', '.join(sorted(missing))}. "
            "Install them, then run this again"
        )
    names = " ".join(sorted(missing))
    steps.console.print(f"  installing with apt-get: {names}")
    with steps.step(f"install {names}"):
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        steps.run(["apt-get", "update", "-q"])
        install = ["apt-get", "install", "-q", "-y", "--no-install-recommends", *sorted(missing)]
        steps.run(install, env=environment)


def _unpack_packages(where: layout.Layout) -> None:
    marker = where.debian / ".unpacked"
    if marker.is_file() and marker.read_text() == "\n".join(_UNPACKED):
        return
    with steps.step(f"unpack {', '.join(_UNPACKED)}"):
        where.debian.mkdir(parents=True, exist_ok=True)
        steps.run(["apt-get", "update", "-q"])
        for package in _UNPACKED:
            steps.run(["apt-get", "download", package], cwd=where.debian)
        for archive in where.debian.glob("*.deb"):
            steps.run(["dpkg-deb", "-x", archive, where.debian])
            archive.unlink()
        marker.write_text("\n".join(_UNPACKED))


def _build_module(where: layout.Layout, module: str) -> None:
    target, proof = _MODULES[module]
    folder = layout.SOURCES / "go" / module
    stamp = where.binaries / f".{module}"
    fingerprint = _fingerprint(folder)
    if (where.binaries / proof).exists() and stamp.is_file() and stamp.read_text() == fingerprint:
        return
    if not shutil.which("go"):
        raise steps.ClusterError("Go is missing: install Go 1.25 or later, then run this again")
    with steps.step(f"build {module} from Go modules"):
        where.binaries.mkdir(parents=True, exist_ok=True)
        output = where.binaries / "coredns" if module == "coredns" else f"{where.binaries}/"
        command = ["go", "build", "-trimpath", "-ldflags", f"-s -w {_VERSION_FLAGS}"]
        environment = {**os.environ, "CGO_ENABLED": "0", "GOFLAGS": "-buildvcs=false"}
        steps.run([*command, "-o", output, target], cwd=folder, env=environment)
        stamp.write_text(fingerprint)


def _fingerprint(folder: Path) -> str:
    listed = sorted(path for path in folder.rglob("*") if path.is_file())
    done = subprocess.run(
        ["sha256sum", *map(str, listed)], check=True, capture_output=True, text=True
    )
    return "\n".join(line.split()[0] for line in done.stdout.splitlines())
