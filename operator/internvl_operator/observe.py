"""What the cluster holds for one resource, as plain facts."""

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from internvl_operator.api import v1alpha1

Object = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Progress:
    """The last progress line of a build container."""

    stage: str
    step: str
    done: int
    total: int

    @property
    def percent(self) -> int:
        """Return how much of the step is done, in percent."""
        return min(100, max(0, 100 * self.done // self.total)) if self.total > 0 else 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """One build Job with its pods, newest pod last."""

    body: Object
    pods: tuple[Object, ...] = ()
    progress: Progress | None = None

    @property
    def name(self) -> str:
        """Name of the Job."""
        return str(self.body["metadata"]["name"])

    @property
    def is_finished(self) -> bool:
        """Whether the Job has succeeded."""
        return self._has_condition("Complete") or self._has_condition("SuccessCriteriaMet")

    @property
    def is_failed(self) -> bool:
        """Whether the Job has given up."""
        return self._has_condition("Failed") or self._has_condition("FailureTarget")

    @property
    def started_at(self) -> str | None:
        """When the Job's controller started it."""
        started: str | None = self.body.get("status", {}).get("startTime")
        return started

    @property
    def owners(self) -> list[Object]:
        """Its owner references."""
        return list(self.body["metadata"].get("ownerReferences", ()))

    def result(self) -> Mapping[str, Any] | None:
        """Return what the last container reported at its good end."""
        for pod in reversed(self.pods):
            for message in termination_messages(pod):
                if "result" in message:
                    found: Mapping[str, Any] = message["result"]
                    return found
        return None

    def _has_condition(self, kind: str) -> bool:
        conditions = self.body.get("status", {}).get("conditions", ())
        return any(c["type"] == kind and c["status"] == "True" for c in conditions)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Observation:
    """One resource and everything that belongs to it."""

    resource: v1alpha1.Resource
    claim: Object | None
    jobs: Mapping[str, Job]
    """The build Jobs of the namespace that this resource owns or could adopt, by name."""
    deployment: Object | None
    service: Object | None
    pods: tuple[Object, ...]
    """Serving pods."""


def container_statuses(pod: Object) -> list[Object]:
    """Return the statuses of a pod's containers, those that run first first."""
    status = pod.get("status", {})
    return [*status.get("initContainerStatuses", ()), *status.get("containerStatuses", ())]


def termination_messages(pod: Object) -> Iterable[Mapping[str, Any]]:
    """Yield the JSON termination messages of a pod, the last container's first."""
    for container in reversed(container_statuses(pod)):
        for state in ("state", "lastState"):
            ended = container.get(state, {}).get("terminated")
            message = parse_json(ended.get("message", "")) if ended else None
            if message:
                yield message


def parse_json(text: str) -> Mapping[str, Any] | None:
    """Return the object that a text holds, or None when it holds none."""
    try:
        parsed = json.loads(text)
    except ValueError:
        return None
    return parsed if isinstance(parsed, dict) else None


def parse_progress(log: str) -> Progress | None:
    """Return the last progress line of a log."""
    for line in reversed(log.splitlines()):
        parsed = parse_json(line)
        match parsed:
            case {"stage": str(stage), "step": str(step), "done": int(done), "total": int(total)}:
                return Progress(stage=stage, step=step, done=done, total=total)
    return None


def running_container(pod: Object) -> str | None:
    """Return the name of the container that runs now."""
    for container in container_statuses(pod):
        if "running" in container.get("state", {}):
            return str(container["name"])
    return None


def is_deployment_ready(deployment: Object | None) -> bool:
    """Whether the wanted replicas of the newest template are ready, and no other is left."""
    if deployment is None:
        return False
    status = deployment.get("status", {})
    is_observed: bool = status.get("observedGeneration", 0) >= deployment["metadata"]["generation"]
    wanted = deployment["spec"].get("replicas", 1)
    fresh = min(status.get("updatedReplicas", 0), status.get("availableReplicas", 0))
    return is_observed and fresh >= wanted and status.get("replicas", 0) == wanted


def is_scaled_to_zero(deployment: Object | None) -> bool:
    """Whether no replica is wanted."""
    return deployment is not None and deployment["spec"].get("replicas", 1) == 0


def select(objects: Iterable[Object], matches: Callable[[Object], bool]) -> tuple[Object, ...]:
    """Return the matching objects, oldest first."""
    chosen = filter(matches, objects)
    return tuple(sorted(chosen, key=lambda o: str(o["metadata"].get("creationTimestamp", ""))))
