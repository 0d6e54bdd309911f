"""The objects that the informer has seen, and which resource each belongs to."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

Object = Mapping[str, Any]

JOB_NAME_LABEL = "batch.kubernetes.io/job-name"
INSTANCE_LABEL = "app.kubernetes.io/instance"


@dataclasses.dataclass(frozen=True)
class ObjectKey:
    """Namespace and name."""

    namespace: str
    name: str


class ObjectCache:
    """Objects by kind, namespace and name; filled by events, listings and our own writes."""

    def __init__(self, *, owner_kind: str) -> None:
        self._owner_kind = owner_kind
        self._objects: dict[str, dict[ObjectKey, Object]] = {}

    def put(self, kind: str, body: Object) -> None:
        """Remember an object, unless a newer version of it is known."""
        known = self._objects.setdefault(kind, {})
        old = known.get(key_of(body))
        if old is None or _version(old) <= _version(body) or _uid(old) != _uid(body):
            known[key_of(body)] = body

    def replace_all(
        self, kind: str, bodies: Iterable[Object], *, namespace: str | None, version: int
    ) -> None:
        """Take over a listing: remember its objects, and forget older ones that it lacks."""
        listed = {key_of(body): body for body in bodies}
        for key, body in list(self._objects.get(kind, {}).items()):
            is_in_scope = namespace is None or key.namespace == namespace
            if is_in_scope and key not in listed and _version(body) <= version:
                self.remove(kind, body)
        for body in listed.values():
            self.put(kind, body)

    def remove(self, kind: str, body: Object) -> None:
        """Forget an object."""
        self._objects.get(kind, {}).pop(key_of(body), None)

    def get(self, kind: str, key: ObjectKey) -> Object | None:
        """Return an object, or None."""
        return self._objects.get(kind, {}).get(key)

    def list_in(self, kind: str, namespace: str) -> list[Object]:
        """Return the objects of a kind in a namespace."""
        found = self._objects.get(kind, {})
        return [body for key, body in found.items() if key.namespace == namespace]

    def keys(self, kind: str) -> list[ObjectKey]:
        """Return the keys of a kind."""
        return list(self._objects.get(kind, {}))

    def resources_of(self, kind: str, body: Object) -> set[ObjectKey]:
        """Return the resources that a child's change concerns."""
        namespace = key_of(body).namespace
        labels = body["metadata"].get("labels", {})
        if kind == "PersistentVolumeClaim":
            return {key for key in self.keys(self._owner_kind) if key.namespace == namespace}
        if kind == "Pod" and JOB_NAME_LABEL in labels:
            job = self.get("Job", ObjectKey(namespace, labels[JOB_NAME_LABEL]))
            return self._owners(job) if job else set()
        if kind == "Pod":
            return {ObjectKey(namespace, labels.get(INSTANCE_LABEL, ""))}
        return self._owners(body)

    def _owners(self, body: Object) -> set[ObjectKey]:
        references: Iterable[Object] = body["metadata"].get("ownerReferences", ())
        namespace = key_of(body).namespace
        owners = (o for o in references if o["kind"] == self._owner_kind)
        return {ObjectKey(namespace, o["name"]) for o in owners}


def key_of(body: Object) -> ObjectKey:
    """Return the key of an object."""
    metadata = body["metadata"]
    return ObjectKey(metadata["namespace"], metadata["name"])


def _version(body: Object) -> int:
    """Return an object's version; versions of one object grow in etcd's order."""
    return int(body["metadata"]["resourceVersion"])


def _uid(body: Object) -> str:
    return str(body["metadata"]["uid"])
