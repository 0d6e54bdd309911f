"""Which cluster and which registry the demo works with."""

import dataclasses
import os
import shutil
from pathlib import Path

from local_cluster import images, layout, steps

ROOT = Path(__file__).resolve().parent.parent.parent
_PYTHON_IMAGE = "docker.io/library/python:3.11-slim-bookworm"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """A cluster with its tools and a registry that its nodes pull from."""

    is_local: bool
    kubectl: tuple[str, ...]
    helm: tuple[str, ...]
    registry: str
    base_image: str

    def run_kubectl(self, *arguments: str | Path, input_text: str | None = None) -> str:
        """Run kubectl; raises ClusterError with its output when it fails."""
        return steps.run([*self.kubectl, *arguments], input_text=input_text)


def choose_target() -> Target:
    """Return the local cluster, or with CLUSTER=current the kubeconfig's current one."""
    match os.environ.get("CLUSTER", ""):
        case "":
            return _local()
        case "current":
            return _current()
        case other:
            raise steps.ClusterError(
                f"CLUSTER={other} is not known: leave it out for the local cluster, or set "
                "CLUSTER=current for the current context of your kubeconfig"
            )


def _local() -> Target:
    where = layout.default_layout()
    option = f"--kubeconfig={where.kubeconfig}"
    return Target(
        is_local=True,
        kubectl=(str(where.tool("kubectl")), option),
        helm=(str(where.tool("helm")), option),
        registry=layout.REGISTRY,
        base_image=images.BASE,
    )


def _current() -> Target:
    registry = os.environ.get("REGISTRY", "")
    if not registry:
        raise steps.ClusterError(
            "CLUSTER=current needs REGISTRY=host/path: a registry that you may push to and that "
            "the cluster's nodes pull from"
        )
    missing = [name for name in ("kubectl", "helm", "buildah") if not shutil.which(name)]
    if missing:
        raise steps.ClusterError(f"CLUSTER=current needs on PATH: {', '.join(missing)}")
    return Target(
        is_local=False,
        kubectl=("kubectl",),
        helm=("helm",),
        registry=registry,
        base_image=os.environ.get("BASE_IMAGE", _PYTHON_IMAGE),
    )
