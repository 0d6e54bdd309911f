"""The status roll-up: conditions, the phase, and the events that tell of changes."""

import dataclasses
import enum
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_MAX_MESSAGE = 1024


class Type(enum.StrEnum):
    """Condition types, in the order in which they become true."""

    VALIDATED = "Validated"
    WEIGHTS_READY = "WeightsReady"
    ENGINE_READY = "EngineReady"
    RUNTIME_READY = "RuntimeReady"
    READY = "Ready"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Condition:
    """One condition before it gets its times."""

    type: Type
    status: bool | None
    """None is `Unknown`: nobody can tell yet."""
    reason: str
    message: str
    is_failure: bool = False
    """Whether someone has to do something; waiting is no failure."""


@dataclasses.dataclass(frozen=True)
class Event:
    """Something that `kubectl describe` should tell."""

    reason: str
    message: str
    is_warning: bool


def roll_up(children: Sequence[Condition]) -> Condition:
    """Return `Ready`: true when every child is, else the first that is not, in its words."""
    for child in children:
        if not child.status:
            return dataclasses.replace(child, type=Type.READY, status=False)
    return Condition(
        type=Type.READY, status=True, reason="Ready", message="the endpoint answers requests"
    )


def write(
    conditions: Iterable[Condition],
    *,
    previous: Sequence[Mapping[str, Any]],
    generation: int,
    now: str,
) -> list[dict[str, Any]]:
    """Return conditions as status has them; a time changes only with its `status`."""
    before = {condition["type"]: condition for condition in previous}
    written = []
    for condition in conditions:
        status = {True: "True", False: "False", None: "Unknown"}[condition.status]
        old = before.get(condition.type.value)
        is_same = old is not None and old["status"] == status
        written.append(
            {
                "type": condition.type.value,
                "status": status,
                "reason": condition.reason,
                "message": condition.message[:_MAX_MESSAGE],
                "observedGeneration": generation,
                "lastTransitionTime": old["lastTransitionTime"] if old and is_same else now,
            }
        )
    return written


def list_transitions(
    conditions: Iterable[Condition], *, previous: Sequence[Mapping[str, Any]]
) -> list[Event]:
    """Return an event for each condition whose status or reason is new.

    `Ready` is left out while it only repeats a child.
    """
    conditions = tuple(conditions)
    repeated = {child.reason for child in conditions if child.type is not Type.READY}
    before = {old["type"]: (old["status"] == "True", old["reason"]) for old in previous}
    return [
        Event(condition.reason, condition.message, condition.is_failure)
        for condition in conditions
        if before.get(condition.type.value) != (bool(condition.status), condition.reason)
        and (condition.type is not Type.READY or condition.reason not in repeated)
        and condition.status is not None
    ]
