"""The Deployment that serves an engine, and its Service."""

import json
import math

from internvl_operator import plan as plans
from internvl_operator import settings
from internvl_operator.api import v1alpha1
from internvl_operator.resources import Manifest, jobs, naming

HTTP_PORT = 8000
METRICS_PORT = 9400
_START_SECONDS = 3600
_PROBE_SECONDS = 5
_GRACE_SECONDS = 90
"""Longer than the runtime's drain, so that running answers end by themselves."""
_PROPAGATION_SECONDS = 5
"""After a pod is ready, until every node's proxy sends connections to it: ready by then is true."""
_TILE_BYTES = 448 * 448 * 3
_SPARE_SHARED_MEBIBYTES = 64


def build_deployment(
    resource: v1alpha1.Resource,
    plan: plans.Plan,
    *,
    keys: plans.EngineKeys,
    images: plans.Images,
    defaults: settings.Settings,
) -> Manifest:
    """Return the Deployment; without `serving.replicas` it leaves their number alone."""
    labels = naming.labels_for("runtime", instance=resource.metadata.name)
    replicas = resource.spec.serving.replicas
    manifest = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": _metadata(resource, labels),
        "spec": {
            **({} if replicas is None else {"replicas": replicas}),
            "minReadySeconds": _PROPAGATION_SECONDS,
            "revisionHistoryLimit": 3,
            "selector": {"matchLabels": selector_for(resource.metadata.name)},
            "strategy": {
                "type": "RollingUpdate",
                "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0},
            },
            "template": {
                "metadata": {"labels": labels, "annotations": {naming.KEY_ANNOTATION: keys.engine}},
                "spec": {
                    "automountServiceAccountToken": False,
                    "enableServiceLinks": False,
                    "terminationGracePeriodSeconds": _GRACE_SECONDS,
                    "securityContext": naming.pod_security(),
                    "containers": [
                        _container(resource, plan, keys=keys, images=images, defaults=defaults)
                    ],
                    "volumes": _volumes(plan),
                },
            },
        },
    }
    return naming.with_fingerprint(manifest)


def build_service(resource: v1alpha1.Resource) -> Manifest:
    """Return the Service that is the resource's endpoint."""
    labels = naming.labels_for("runtime", instance=resource.metadata.name)
    manifest = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": _metadata(resource, labels),
        "spec": {
            "type": "ClusterIP",
            "selector": selector_for(resource.metadata.name),
            "ports": [{"name": "http", "port": HTTP_PORT, "targetPort": "http", "protocol": "TCP"}],
        },
    }
    return naming.with_fingerprint(manifest)


def selector_for(instance: str) -> dict[str, str]:
    """Return the labels that select serving pods; they never change."""
    labels = naming.labels_for("runtime", instance=instance)
    chosen = ("name", "instance", "component")
    return {f"app.kubernetes.io/{x}": labels[f"app.kubernetes.io/{x}"] for x in chosen}


def endpoint_of(resource: v1alpha1.Resource) -> str:
    """Return the base URL of the OpenAI API inside the cluster."""
    return f"http://{resource.metadata.name}.{resource.metadata.namespace}.svc:{HTTP_PORT}/v1"


def _metadata(resource: v1alpha1.Resource, labels: dict[str, str]) -> Manifest:
    return {
        "name": resource.metadata.name,
        "namespace": resource.metadata.namespace,
        "labels": labels,
        "ownerReferences": [naming.owner_reference(resource, is_controller=True)],
    }


def _container(
    resource: v1alpha1.Resource,
    plan: plans.Plan,
    *,
    keys: plans.EngineKeys,
    images: plans.Images,
    defaults: settings.Settings,
) -> Manifest:
    return {
        "name": "runtime",
        "image": images.runtime,
        "imagePullPolicy": defaults.image_pull_policy,
        "args": ["serve", "--engine", f"{jobs.CACHE_FOLDER}/engines/{keys.engine}"],
        "env": [
            {
                "name": "INTERNVL_RUNTIME_SERVED_MODEL_NAMES",
                "value": json.dumps(list(plan.served_names)),
            },
        ],
        "ports": [
            {"name": "http", "containerPort": HTTP_PORT, "protocol": "TCP"},
            {"name": "metrics", "containerPort": METRICS_PORT, "protocol": "TCP"},
        ],
        "startupProbe": {
            **_probe("/readyz"),
            "periodSeconds": 2,
            "failureThreshold": _START_SECONDS // 2,
        },
        "readinessProbe": {**_probe("/readyz"), "periodSeconds": _PROBE_SECONDS},
        "livenessProbe": {
            **_probe("/healthz"),
            "periodSeconds": 2 * _PROBE_SECONDS,
            "failureThreshold": 6,
        },
        "resources": resource.spec.serving.resources or defaults.runtime_resources,
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "securityContext": naming.container_security(),
        "volumeMounts": [
            {"name": "cache", "mountPath": jobs.CACHE_FOLDER, "readOnly": True},
            {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108 - an emptyDir of the pod
            {"name": "shared-memory", "mountPath": "/dev/shm"},  # noqa: S108 - likewise
        ],
    }


def _shared_memory(plan: plans.Plan) -> str:
    """Return room for the tiles of one request, on their way to the engine."""
    tiles = plan.build_flags["maxTilesPerRequest"]
    return f"{_SPARE_SHARED_MEBIBYTES + math.ceil(tiles * _TILE_BYTES / 2**20)}Mi"


def _probe(path: str) -> Manifest:
    return {"httpGet": {"path": path, "port": "http"}, "timeoutSeconds": _PROBE_SECONDS}


def _volumes(plan: plans.Plan) -> list[Manifest]:
    shared = {"medium": "Memory", "sizeLimit": _shared_memory(plan)}
    return [
        {"name": "cache", "persistentVolumeClaim": {"claimName": plan.claim_name}},
        {"name": "tmp", "emptyDir": {}},
        {"name": "shared-memory", "emptyDir": shared},
    ]
