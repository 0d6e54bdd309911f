"""The claim that holds weights, checkpoints and engines."""

from internvl_operator import settings
from internvl_operator.api import v1alpha1
from internvl_operator.plan import Plan
from internvl_operator.resources import Manifest, naming


def build_claim(
    resource: v1alpha1.Resource, plan: Plan, *, defaults: settings.Settings
) -> Manifest:
    """Return the cache claim. It has no owner: what was paid for outlives a resource."""
    spec = resource.spec.cache
    storage_class = spec.storage_class_name or defaults.cache_storage_class
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {
            "name": plan.claim_name,
            "namespace": resource.metadata.namespace,
            "labels": naming.labels_for("cache", instance=plan.claim_name),
        },
        "spec": {
            "accessModes": [spec.access_mode],
            "resources": {"requests": {"storage": spec.size or defaults.cache_size}},
            **({"storageClassName": storage_class} if storage_class else {}),
        },
    }
