"""Names, labels, owners and the security of every child."""

from internvl_operator import keys
from internvl_operator.api import v1alpha1
from internvl_operator.resources import Manifest

MANAGED_BY = "internvl-operator"
PART_OF = "internvl"
KEY_ANNOTATION = f"{v1alpha1.GROUP}/key"
FINGERPRINT_ANNOTATION = f"{v1alpha1.GROUP}/applied"
_MAX_NAME = 63
_USER_ID = 10001
"""The user of the images; they have a passwd entry for it."""


def name_for(*parts: str) -> str:
    """Join parts to a name of at most 63 characters, hashed where it would be longer."""
    name = "-".join(parts)
    if len(name) <= _MAX_NAME:
        return name
    digest = keys.short_hash(name)
    return f"{name[: _MAX_NAME - len(digest) - 1]}-{digest}"


def labels_for(component: str, *, instance: str) -> dict[str, str]:
    """Return the recommended labels of a child."""
    return {
        "app.kubernetes.io/name": "internvl-runtime",
        "app.kubernetes.io/instance": instance,
        "app.kubernetes.io/component": component,
        "app.kubernetes.io/part-of": PART_OF,
        "app.kubernetes.io/managed-by": MANAGED_BY,
    }


def with_fingerprint(manifest: Manifest) -> Manifest:
    """Return a manifest that carries its own hash, so that a field left out is seen too."""
    annotations = {FINGERPRINT_ANNOTATION: keys.short_hash(manifest)}
    return {**manifest, "metadata": {**manifest["metadata"], "annotations": annotations}}


def owner_reference(resource: v1alpha1.Resource, *, is_controller: bool) -> Manifest:
    """Return the reference that lets the cluster remove a child with its owner."""
    return {
        "apiVersion": v1alpha1.API_VERSION,
        "kind": v1alpha1.KIND,
        "name": resource.metadata.name,
        "uid": resource.metadata.uid,
        "controller": is_controller,
        "blockOwnerDeletion": is_controller,
    }


def pod_security() -> Manifest:
    """Return a pod security context that the restricted profile admits."""
    return {
        "runAsNonRoot": True,
        "runAsUser": _USER_ID,
        "runAsGroup": _USER_ID,
        "fsGroup": _USER_ID,
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def container_security() -> Manifest:
    """Return a container security context that the restricted profile admits."""
    return {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "readOnlyRootFilesystem": True,
    }
