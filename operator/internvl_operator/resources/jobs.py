"""The build Jobs: resolve, checkpoint, engine.

A Job is named by what it makes, so that two resources that want the same
thing share it, and a restarted operator finds it.
"""

import dataclasses
import json
from collections.abc import Sequence

from internvl_operator import plan as plans
from internvl_operator import settings
from internvl_operator.api import v1alpha1
from internvl_operator.keys import short_hash
from internvl_operator.resources import Manifest, naming

CACHE_FOLDER = "/cache"
RESOLVE_TTL_SECONDS = 600
BUILD_TTL_SECONDS = 3600
_BACKOFF_LIMIT = 3
_EXIT_FINAL = 80
"""The runtime's exit code for failures that another try would repeat."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class JobContext:
    """What every Job of a resource shares."""

    resource: v1alpha1.Resource
    plan: plans.Plan
    images: plans.Images
    claim_uid: str
    defaults: settings.Settings


def resolve_name(request: str) -> str:
    """Return the name of the resolve Job of a request."""
    return naming.name_for("ivl-resolve", request)


def checkpoint_name(key: str, *, claim_uid: str) -> str:
    """Return the name of the Job that makes a checkpoint in a claim."""
    return naming.name_for("ivl-checkpoint", key[:12], short_hash(claim_uid)[:6])


def engine_name(key: str, *, claim_uid: str) -> str:
    """Return the name of the Job that makes an engine in a claim."""
    return naming.name_for("ivl-engine", key[:12], short_hash(claim_uid)[:6])


def build_resolve_job(context: JobContext, *, name: str) -> Manifest:
    """Return the Job that identifies the weights."""
    command = ["resolve", "--source", json.dumps(context.plan.source, sort_keys=True)]
    containers = [_container(context, "resolve", command, image=context.images.tools)]
    return _job(context, name, component="resolve", containers=containers, ttl=RESOLVE_TTL_SECONDS)


def build_checkpoint_job(context: JobContext, keys: plans.EngineKeys) -> Manifest:
    """Return the Job that fetches the weights and converts them."""
    source = json.dumps(context.plan.source, sort_keys=True)
    fetch = ["fetch", "--source", source, "--weights", keys.weights]
    convert = ["convert", "--weights", keys.weights, "--dtype", context.plan.dtype]
    tools = context.images.tools
    containers = [
        _container(context, "fetch", fetch, image=tools),
        _container(context, "convert", convert, image=tools),
    ]
    name = checkpoint_name(keys.checkpoint, claim_uid=context.claim_uid)
    return _job(context, name, component="checkpoint", containers=containers)


def build_engine_job(context: JobContext, keys: plans.EngineKeys) -> Manifest:
    """Return the Job that builds and verifies an engine."""
    plan = context.plan
    command = [
        "build",
        "--checkpoint", keys.checkpoint,
        "--backend", plan.backend,
        "--architecture", plan.architecture,
        "--versions", json.dumps(dict(plan.release.versions), sort_keys=True),
        "--flags", json.dumps(dict(plan.build_flags), sort_keys=True),
    ]  # fmt: skip
    containers = [_container(context, "build", command, image=context.images.builder)]
    name = engine_name(keys.engine, claim_uid=context.claim_uid)
    return _job(context, name, component="engine", containers=containers)


def _job(
    context: JobContext,
    name: str,
    *,
    component: str,
    containers: Sequence[Manifest],
    ttl: int = BUILD_TTL_SECONDS,
) -> Manifest:
    resource = context.resource
    labels = naming.labels_for(component, instance=name)
    *earlier, last = containers
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            "name": name,
            "namespace": resource.metadata.namespace,
            "labels": labels,
            "ownerReferences": [naming.owner_reference(resource, is_controller=False)],
        },
        "spec": {
            "backoffLimit": _BACKOFF_LIMIT,
            "ttlSecondsAfterFinished": ttl,
            "podFailurePolicy": _failure_policy(),
            "template": {
                "metadata": {"labels": labels},
                "spec": {
                    "restartPolicy": "Never",
                    "automountServiceAccountToken": False,
                    "enableServiceLinks": False,
                    "securityContext": naming.pod_security(),
                    "initContainers": earlier,
                    "containers": [last],
                    "volumes": _volumes(context.plan),
                },
            },
        },
    }


def _failure_policy() -> Manifest:
    return {
        "rules": [
            {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget"}]},
            {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [_EXIT_FINAL]}},
        ]
    }


def _container(context: JobContext, name: str, arguments: Sequence[str], *, image: str) -> Manifest:
    return {
        "name": name,
        "image": image,
        "imagePullPolicy": context.defaults.image_pull_policy,
        "args": list(arguments),
        "resources": context.defaults.job_resources,
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "securityContext": naming.container_security(),
        "volumeMounts": _mounts(context.plan),
    }


def _volumes(plan: plans.Plan) -> list[Manifest]:
    volumes: list[Manifest] = [
        {"name": "cache", "persistentVolumeClaim": {"claimName": plan.claim_name}},
        {"name": "tmp", "emptyDir": {}},
    ]
    if plan.source_claim:
        claim = {"claimName": plan.source_claim, "readOnly": True}
        volumes.append({"name": "source", "persistentVolumeClaim": claim})
    return volumes


def _mounts(plan: plans.Plan) -> list[Manifest]:
    mounts: list[Manifest] = [
        {"name": "cache", "mountPath": CACHE_FOLDER},
        {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108 - an emptyDir of the pod
    ]
    if plan.source_claim:
        path = f"{plans.SOURCES_FOLDER}/{plan.source_claim}"
        mounts.append({"name": "source", "mountPath": path, "readOnly": True})
    return mounts
