"""The API server: the only module that knows the `kubernetes` package."""

import datetime
import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import aiohttp
from kubernetes.aio import client, config

from internvl_operator import errors, metrics

FIELD_MANAGER = "internvl-operator"
STATUS_MANAGER = "internvl-operator-status"
_TIMEOUT_SECONDS = 30.0
_PAGE_SIZE = 500
_NOT_FOUND = 404
_CONFLICT = 409
_MERGE_PATCH = "application/merge-patch+json"
_APPLY_PATCH = "application/apply-patch+yaml"
_PLURALS = {
    "Deployment": "deployments",
    "Event": "events",
    "InternVLDeployment": "internvldeployments",
    "Job": "jobs",
    "PersistentVolumeClaim": "persistentvolumeclaims",
    "Pod": "pods",
    "Service": "services",
}

Body = Mapping[str, Any]
OnWrite = Callable[[Body], None]
"""Gets every object as a write has left it, so that a cache is never behind its own writes."""


class Kube:
    """Calls of one operator, each with a timeout, none repeated here."""

    def __init__(self, api: client.ApiClient, *, on_write: OnWrite) -> None:
        self._api = api
        self._on_write = on_write

    async def close(self) -> None:
        """Close the connections."""
        await self._api.close()

    async def apply(self, manifest: Body) -> None:
        """Create or change an object; we own its fields, so we take them from others."""
        await self._write(
            "PATCH",
            path_of(manifest),
            query=[("fieldManager", FIELD_MANAGER), ("force", "true")],
            body=manifest,
            content_type=_APPLY_PATCH,
        )
        metrics.WRITES.labels("apply", manifest["kind"]).inc()

    async def find(self, manifest: Body) -> Body | None:
        """Return what has a manifest's kind and name, None if nothing has."""
        try:
            found: Body = json.loads(await self._request("GET", path_of(manifest)))
        except errors.KubeNotFoundError:
            return None
        return found

    async def create(self, manifest: Body) -> None:
        """Create an object; raises KubeConflictError when it exists."""
        collection = path_of(manifest).rpartition("/")[0]
        await self._write(
            "POST", collection, query=[("fieldManager", FIELD_MANAGER)], body=manifest
        )
        metrics.WRITES.labels("create", manifest["kind"]).inc()

    async def set_owners(self, body: Body, owners: Sequence[Body]) -> None:
        """Replace owner references; raises KubeConflictError when the object has changed.

        Shared Jobs have several owners, and server-side apply can not remove an
        entry that another manager wrote: hence a merge patch with a precondition.
        """
        metadata = {
            "ownerReferences": list(owners),
            "resourceVersion": body["metadata"]["resourceVersion"],
        }
        await self._write(
            "PATCH", path_of(body), body={"metadata": metadata}, content_type=_MERGE_PATCH
        )
        metrics.WRITES.labels("own", body["kind"]).inc()

    async def delete(self, body: Body) -> None:
        """Delete an object and what it owns, if it is still the same one."""
        options = {
            "propagationPolicy": "Background",
            "preconditions": {"uid": body["metadata"]["uid"]},
        }
        try:
            await self._request("DELETE", path_of(body), body=options)
        except errors.KubeNotFoundError:
            return
        metrics.WRITES.labels("delete", body["kind"]).inc()

    async def apply_status(self, resource: Any, status: Body) -> None:
        """Write the whole status of an InternVLDeployment."""
        body = {
            "apiVersion": "serving.internvl.dev/v1alpha1",
            "kind": "InternVLDeployment",
            "metadata": {
                "name": resource.metadata.name,
                "namespace": resource.metadata.namespace,
                "uid": resource.metadata.uid,
            },
            "status": status,
        }
        await self._write(
            "PATCH",
            f"{path_of(body)}/status",
            query=[("fieldManager", STATUS_MANAGER), ("force", "true")],
            body=body,
            content_type=_APPLY_PATCH,
        )
        metrics.WRITES.labels("status", "InternVLDeployment").inc()

    async def list_all(
        self, api_version: str, kind: str, *, namespace: str | None, selector: str
    ) -> tuple[list[Body], int]:
        """Return the objects of a kind, and the version of the store that they are of."""
        root = f"/apis/{api_version}" if "/" in api_version else f"/api/{api_version}"
        scope = f"/namespaces/{namespace}" if namespace else ""
        found: list[Body] = []
        next_page = ""
        while True:
            query = [("limit", str(_PAGE_SIZE)), ("labelSelector", selector)]
            if next_page:
                query.append(("continue", next_page))
            text = await self._request("GET", f"{root}{scope}/{_PLURALS[kind]}", query=query)
            page = json.loads(text)
            typed = {"apiVersion": api_version, "kind": kind}
            found += [{**typed, **item} for item in page["items"]]
            next_page = page["metadata"].get("continue", "")
            if not next_page:
                return found, int(page["metadata"]["resourceVersion"])

    async def read_log(self, pod: Body, *, container: str, lines: int) -> str:
        """Return the last lines of a container's log."""
        path = path_of({"apiVersion": "v1", "kind": "Pod", **pod})
        query = [("container", container), ("tailLines", str(lines))]
        return await self._request("GET", f"{path}/log", query=query)

    async def post_event(self, resource: Any, event: Any) -> None:
        """Tell of a change in the resource's namespace."""
        now = datetime.datetime.now(tz=datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        # kubectl describe lists events by name: the time in it keeps their order.
        name = f"{resource.metadata.name}.{time.time_ns():x}"
        metadata = resource.metadata
        await self.create(
            {
                "apiVersion": "events.k8s.io/v1",
                "kind": "Event",
                "metadata": {
                    "name": name,
                    "namespace": metadata.namespace,
                },
                "eventTime": now,
                "action": "Reconcile",
                "reason": event.reason,
                "note": event.message[:1000],
                "type": "Warning" if event.is_warning else "Normal",
                "reportingController": "serving.internvl.dev/operator",
                "reportingInstance": FIELD_MANAGER,
                "regarding": {
                    "apiVersion": "serving.internvl.dev/v1alpha1",
                    "kind": "InternVLDeployment",
                    "name": metadata.name,
                    "namespace": metadata.namespace,
                    "uid": metadata.uid,
                },
            }
        )

    async def _write(self, method: str, path: str, **arguments: Any) -> None:
        self._on_write(json.loads(await self._request(method, path, **arguments)))

    async def _request(
        self,
        method: str,
        path: str,
        *,
        query: Sequence[tuple[str, str]] = (),
        body: Body | None = None,
        content_type: str = "application/json",
    ) -> str:
        request = await self._api.param_serialize(
            method,
            path,
            query_params=list(query),
            header_params={"Accept": "*/*", "Content-Type": content_type},
            body=body,
            auth_settings=["BearerToken"],
        )
        try:
            response = await self._api.call_api(*request, _request_timeout=_TIMEOUT_SECONDS)
            content = await response.read()
        except (aiohttp.ClientError, TimeoutError) as e:
            raise errors.KubeError(0, f"{method} {path}: {e!r}") from e
        text = bytes(content or b"").decode(errors="replace")
        _check_status(response.status, text)
        return text


def path_of(body: Body) -> str:
    """Return the path of a namespaced object."""
    version, metadata = str(body["apiVersion"]), body["metadata"]
    root = f"/apis/{version}" if "/" in version else f"/api/{version}"
    plural = _PLURALS[body["kind"]]
    return f"{root}/namespaces/{metadata['namespace']}/{plural}/{metadata['name']}"


async def connect(*, on_write: OnWrite) -> Kube:
    """Connect as a pod does, or by the kubeconfig outside a cluster."""
    try:
        config.load_incluster_config()
    except config.ConfigException:
        await config.load_kube_config()
    return Kube(client.ApiClient(), on_write=on_write)


def _check_status(status: int, text: str) -> None:
    if status < 400:  # noqa: PLR2004 - where HTTP's errors begin
        return
    try:
        message = json.loads(text).get("message", text)
    except ValueError:
        message = text
    by_status = {_NOT_FOUND: errors.KubeNotFoundError, _CONFLICT: errors.KubeConflictError}
    raise by_status.get(status, errors.KubeError)(status, message)
