"""From the state of pods to one reason, one message and one remedy."""

import dataclasses
from collections.abc import Iterable

from internvl_operator import errors, observe

_IMAGE_REASONS = {"ImagePullBackOff", "ErrImagePull", "InvalidImageName", "ErrImageNeverPull"}
_EXIT_ENGINE_INCOMPATIBLE = 81
_CRASHES = 2
"""Restarts after which a container that does not stay up is called a crash loop."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """Why something does not go on."""

    reason: errors.Reason
    message: str


def diagnose_job(job: observe.Job) -> Finding:
    """Say why a Job has failed."""
    for pod in reversed(job.pods):
        finding = (
            _reported(pod)
            or _ended(pod, otherwise=errors.Reason.BUILD_FAILED)
            or diagnose_waiting(pod)
        )
        if finding:
            return finding
    return Finding(
        errors.Reason.BUILD_FAILED,
        f"Job {job.name} has failed; its pods are gone: change the spec, or delete the Job, to "
        "build again",
    )


def diagnose_waiting(pod: observe.Object) -> Finding | None:
    """Say why a pod does not start, if something is wrong with it."""
    return _unscheduled(pod) or _image_missing(pod)


def diagnose_serving(pods: Iterable[observe.Object]) -> Finding | None:
    """Say what is wrong with the newest serving pod that has a fault."""
    for pod in reversed(tuple(pods)):
        finding = diagnose_waiting(pod) or _crashed(pod)
        if finding:
            return finding
    return None


def _crashed(pod: observe.Object) -> Finding | None:
    for container in observe.container_statuses(pod):
        ended = _termination(container)
        if not ended or container.get("ready"):
            continue
        is_incompatible = ended.get("exitCode") == _EXIT_ENGINE_INCOMPATIBLE
        if is_incompatible or container.get("restartCount", 0) >= _CRASHES:
            return _reported(pod) or _ended(pod, otherwise=errors.Reason.CRASH_LOOP)
    return None


def _reported(pod: observe.Object) -> Finding | None:
    for message in observe.termination_messages(pod):
        if "reason" in message:
            remedy = f": {message['remedy']}" if message.get("remedy") else ""
            return Finding(_reason(str(message["reason"])), f"{message['message']}{remedy}")
    return None


def _reason(text: str) -> errors.Reason:
    try:
        return errors.Reason(text)
    except ValueError:
        return errors.Reason.BUILD_FAILED


def _ended(pod: observe.Object, *, otherwise: errors.Reason) -> Finding | None:
    for container in observe.container_statuses(pod):
        ended = _termination(container)
        if ended and ended.get("reason") == "OOMKilled":
            return Finding(
                errors.Reason.OUT_OF_MEMORY,
                f"container {container['name']} was killed for memory: raise its memory limit",
            )
        if ended and ended.get("exitCode"):
            tail = str(ended.get("message", "")).strip().splitlines()[-1:]
            return Finding(
                otherwise,
                f"container {container['name']} ended with exit code {ended['exitCode']}: "
                f"{''.join(tail) or 'read its log'}",
            )
    return None


def _termination(container: observe.Object) -> observe.Object | None:
    """Return how a container has ended, now or before its last restart."""
    for state in ("state", "lastState"):
        ended: observe.Object | None = container.get(state, {}).get("terminated")
        if ended:
            return ended
    return None


def _unscheduled(pod: observe.Object) -> Finding | None:
    for condition in pod.get("status", {}).get("conditions", ()):
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            text = condition.get("message", "")
            is_volume = "persistentvolumeclaim" in text.lower()
            reason = errors.Reason.VOLUME_NOT_BOUND if is_volume else errors.Reason.UNSCHEDULABLE
            return Finding(reason, f"pod {pod['metadata']['name']} can not be placed: {text}")
    return None


def _image_missing(pod: observe.Object) -> Finding | None:
    for container in observe.container_statuses(pod):
        waiting = container.get("state", {}).get("waiting")
        if waiting and waiting.get("reason") in _IMAGE_REASONS:
            return Finding(
                errors.Reason.IMAGE_PULL_FAILED,
                f"image {container.get('image')} can not be pulled: {waiting.get('message', '')}",
            )
    return None
