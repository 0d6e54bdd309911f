"""A pod of one container and one volume that the restricted profile admits."""

from collections.abc import Sequence
from typing import Any

_USER_ID = 10001
"""The user of the images."""


def restricted_pod(
    name: str,
    *,
    namespace: str,
    image: str,
    command: Sequence[str],
    path: str,
    volume: dict[str, Any],
) -> dict[str, Any]:
    """Return a pod that runs a command once, with a volume mounted at a path."""
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {
            "restartPolicy": "Never",
            "automountServiceAccountToken": False,
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": _USER_ID,
                "fsGroup": _USER_ID,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": [
                {
                    "name": "main",
                    "image": image,
                    "command": list(command),
                    "securityContext": {
                        "allowPrivilegeEscalation": False,
                        "capabilities": {"drop": ["ALL"]},
                        "readOnlyRootFilesystem": True,
                    },
                    "volumeMounts": [{"name": "data", "mountPath": path}],
                }
            ],
            "volumes": [{"name": "data", **volume}],
        },
    }
