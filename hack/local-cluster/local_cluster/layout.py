"""Where the local cluster keeps things, and the addresses and versions it uses."""

import dataclasses
import ipaddress
import os
from pathlib import Path

KUBERNETES_VERSION = "v1.34.4"
SOURCES = Path(__file__).resolve().parent.parent

NODE_NAME = "internvl-local"
NODE_ADDRESS = "198.18.0.1"
NODE_LINK = "ivl-node"
POD_LINK = "ivl-pods"
TEST_NETWORK = "198.18.0.0/15"
"""Reserved for tests by RFC 2544: no real network has these addresses."""
POD_NETWORK = "198.18.64.0/18"
SERVICE_NETWORK = "198.19.0.0/16"
API_SERVICE_ADDRESS = str(next(ipaddress.ip_network(SERVICE_NETWORK).hosts()))
API_PORT = 6443
REGISTRY_PORT = 5000
REGISTRY = f"{NODE_ADDRESS}:{REGISTRY_PORT}"
CGROUP = "internvl-local-cluster"
NFT_TABLE = "internvl-local-cluster"


@dataclasses.dataclass(frozen=True)
class Layout:
    """Folders of one cluster, all below one cache folder."""

    root: Path

    @property
    def tools(self) -> Path:
        """Programs by version; survive everything but a purge."""
        return self.root / "tools"

    @property
    def store(self) -> Path:
        """Content of containerd, registry and buildah; survives `down`."""
        return self.root / "store"

    @property
    def state(self) -> Path:
        """Everything else; `down` removes it."""
        return self.root / "state"

    @property
    def logs(self) -> Path:
        """Logs of the components."""
        return self.state / "logs"

    @property
    def pki(self) -> Path:
        """Certificates and kubeconfigs."""
        return self.state / "pki"

    @property
    def kubeconfig(self) -> Path:
        """The administrator's kubeconfig."""
        return self.root / "kubeconfig"

    @property
    def containerd_socket(self) -> Path:
        """Where containerd listens."""
        return self.state / "containerd.sock"

    @property
    def binaries(self) -> Path:
        """Programs built from Go modules."""
        return self.tools / f"kubernetes-{KUBERNETES_VERSION}"

    @property
    def debian(self) -> Path:
        """Unpacked Debian packages: programs that must not be enabled as services."""
        return self.tools / "debian"

    def tool(self, name: str) -> Path:
        """Return the path of a program that the cluster brings along."""
        if (self.binaries / name).exists():
            return self.binaries / name
        for folder in ("usr/bin", "usr/sbin"):
            if (self.debian / folder / name).exists():
                return self.debian / folder / name
        return self.binaries / name


def default_layout() -> Layout:
    """Return the layout below the user's cache folder."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Layout(cache / "internvl-operator" / "local-cluster")
