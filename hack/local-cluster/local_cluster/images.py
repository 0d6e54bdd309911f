"""The images that every cluster needs, and buildah below the cache folder."""

import os
import shutil
import subprocess
import urllib.request
from collections.abc import Iterable, Sequence
from pathlib import Path

from local_cluster import layout, steps

BASE = "localhost/internvl-base:bookworm"
_PACKAGES = "python3,python3-venv,ca-certificates,libgomp1"
_FREE_BYTES = 30 * 10**9
_PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_CERTIFICATES = Path("/etc/ssl/certs")


def buildah(where: layout.Layout, *arguments: str | Path) -> list[str | Path]:
    """Return a buildah command that keeps its content below the cache folder."""
    store = where.store / "buildah"
    return ["buildah", "--root", store, "--runroot", store / "run", *arguments]


def check_disk(where: layout.Layout) -> None:
    """Raise ClusterError when the disk is too full to begin."""
    where.root.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(where.root).free
    if free < _FREE_BYTES:
        raise steps.ClusterError(
            f"{where.root} has {free / 1e9:.0f} GB free, {_FREE_BYTES / 1e9:.0f} GB are needed: "
            "make room, or remove old content with make cluster-down PURGE=1"
        )


def prune(where: layout.Layout) -> None:
    """Remove buildah's images and the registry's content that nothing names any more."""
    if (where.store / "buildah").exists():
        steps.run(buildah(where, "rmi", "--prune"))
    if (where.store / "registry" / "docker").exists():
        registry = where.tool("docker-registry")
        configuration = where.state / "registry.yml"
        steps.run([registry, "garbage-collect", "--delete-untagged", configuration])


def prune_node(where: layout.Layout, keep: Iterable[str]) -> None:
    """Remove from containerd the images of this registry that are neither kept nor in use."""
    ctr: list[str | Path] = [where.tool("ctr"), f"--address={where.containerd_socket}"]
    ctr.append("--namespace=k8s.io")
    used = steps.run([*ctr, "containers", "ls"])
    kept = {reference.rpartition("@")[2] for reference in keep}
    for line in steps.run([*ctr, "images", "ls"]).splitlines()[1:]:
        name, _, digest = line.split()[:3]
        is_ours = name.startswith((layout.REGISTRY, "sha256:"))
        is_pause = name.startswith(f"{layout.REGISTRY}/pause")
        if is_ours and not is_pause and digest not in kept and name not in used:
            steps.run([*ctr, "images", "rm", name])


def ensure_pause(where: layout.Layout) -> None:
    """Put the sandbox's image into the registry."""
    reference = f"{layout.REGISTRY}/pause:1"
    if is_in_registry("pause", "1"):
        return
    with steps.step("make the sandbox image"):
        container = steps.run(buildah(where, "from", "scratch")).split()[-1]
        steps.run(buildah(where, "copy", container, where.tool("pause"), "/pause"))
        steps.run(buildah(where, "config", "--entrypoint", '["/pause"]', container))
        steps.run(buildah(where, "config", "--user", "65535:65535", container))
        steps.run(buildah(where, "commit", "--rm", container, reference))
        steps.run(buildah(where, "push", "--tls-verify=false", reference))


def ensure_base(where: layout.Layout) -> None:
    """Make the base image that stands in for the public Python image."""
    if _exists(where, BASE):
        return
    with steps.step("make the base image with debootstrap"):
        rootfs = where.store / "rootfs"
        shutil.rmtree(rootfs, ignore_errors=True)
        command = ["debootstrap", "--variant=minbase", f"--include={_PACKAGES}", "bookworm"]
        steps.run([*command, rootfs])
        shutil.rmtree(rootfs / "var/cache/apt/archives", ignore_errors=True)
        shutil.rmtree(rootfs / "var/lib/apt/lists", ignore_errors=True)
        container = steps.run(buildah(where, "from", "scratch")).split()[-1]
        steps.run(buildah(where, "add", container, rootfs, "/"))
        steps.run(buildah(where, "config", "--env", _PATH, container))
        steps.run(buildah(where, "commit", "--rm", container, BASE))
        shutil.rmtree(rootfs)


def build(
    where: layout.Layout,
    *,
    dockerfile: Path,
    context: Path,
    target: str | None,
    tag: str,
    arguments: Sequence[str] = (),
) -> str:
    """Build an image; returns its id. Its layers stay for the next build."""
    options = [f"--build-arg={argument}" for argument in arguments]
    if target:
        options.append(f"--target={target}")
    output = steps.run(
        buildah(
            where,
            "bud",
            "--isolation=chroot",
            "--network=host",
            "--layers",
            f"--volume={_CERTIFICATES}:{_CERTIFICATES}:ro",
            *options,
            f"--file={dockerfile}",
            f"--tag={tag}",
            str(context),
        ),
        env={**os.environ, "BUILDAH_FORMAT": "oci"},
    )
    return output.split()[-1]


def push(where: layout.Layout, *, tag: str, reference: str) -> str:
    """Push an image to a registry; returns its digest."""
    digest = where.store / "digest"
    insecure = ["--tls-verify=false"] if reference.startswith(layout.REGISTRY) else []
    steps.run(buildah(where, "push", f"--digestfile={digest}", *insecure, tag, reference))
    return digest.read_text().strip()


def _exists(where: layout.Layout, tag: str) -> bool:
    done = subprocess.run(
        [str(x) for x in buildah(where, "inspect", "--type=image", tag)],
        capture_output=True,
        check=False,
    )
    return done.returncode == 0


def is_in_registry(name: str, version: str) -> bool:
    """Whether the local registry has an image under a tag or digest."""
    return is_answering(f"http://{layout.REGISTRY}/v2/{name}/manifests/{version}")


def is_answering(url: str) -> bool:
    """Whether a server of the cluster answers with success, asked without any proxy."""
    accepted = "application/vnd.oci.image.manifest.v1+json, */*"
    request = urllib.request.Request(url, headers={"Accept": accepted})  # noqa: S310
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=5):
            return True
    except OSError:
        return False
