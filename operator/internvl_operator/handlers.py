"""kopf as the informer: events fill the cache and enqueue keys; nothing is decided here."""

import asyncio
import contextlib
import dataclasses
from collections.abc import Mapping
from typing import Any

import kopf

from internvl_operator import cache, errors, kube, observe, reconcile, settings, workqueue
from internvl_operator.api import v1alpha1
from internvl_operator.resources import naming


@dataclasses.dataclass(frozen=True)
class ChildKind:
    """A kind of children, and the labels that tell ours from others."""

    group: str
    plural: str
    labels: Mapping[str, str]

    @property
    def api_version(self) -> str:
        """Group and version as manifests have them."""
        return f"{self.group}/v1" if self.group else "v1"

    @property
    def selector(self) -> str:
        """The labels as the API server takes them; empty for every object."""
        return ",".join(f"{key}={value}" for key, value in self.labels.items())


_MANAGED = {"app.kubernetes.io/managed-by": naming.MANAGED_BY}
CHILDREN = {
    "Job": ChildKind("batch", "jobs", _MANAGED),
    "Deployment": ChildKind("apps", "deployments", _MANAGED),
    "Service": ChildKind("", "services", _MANAGED),
    "Pod": ChildKind("", "pods", _MANAGED),
    # Claims may be made by users, so that they carry no label of ours.
    "PersistentVolumeClaim": ChildKind("", "persistentvolumeclaims", {}),
}
_SECOND_LISTING_SECONDS = 15.0
_RETRY_SECONDS = 2.0


@dataclasses.dataclass
class Controller:
    """What the handlers share: the cache, the queue, the client."""

    defaults: settings.Settings
    objects: cache.ObjectCache = dataclasses.field(init=False)
    client: kube.Kube | None = None
    queue: workqueue.WorkQueue[cache.ObjectKey] = dataclasses.field(init=False)
    progress: reconcile.ProgressReader = dataclasses.field(default_factory=reconcile.ProgressReader)
    tasks: "list[asyncio.Task[None]]" = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        self.objects = cache.ObjectCache(owner_kind=v1alpha1.KIND)
        self.queue = workqueue.WorkQueue(self.reconcile)

    async def start(self) -> None:
        """Connect, see what there is, and begin to work.

        Without the listing, the first reconciliations would take children that
        no event has told of yet for absent.
        """
        if self.client is None:
            self.client = await kube.connect(on_write=self._remember)
        try:
            await self._list_children()
        except errors.KubeError as e:
            raise kopf.TemporaryError(str(e), delay=_RETRY_SECONDS) from e
        self.tasks = [
            asyncio.create_task(self.queue.run(self.defaults.workers), name="workers"),
            asyncio.create_task(self._list_children_again(), name="second-listing"),
        ]

    async def stop(self) -> None:
        """End the workers and close the connections."""
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        if self.client:
            await self.client.close()

    def note_resource(self, kind: str | None, body: cache.Object) -> None:
        """Take over an event of a resource."""
        key = cache.key_of(body)
        if kind == "DELETED":
            self.objects.remove(v1alpha1.KIND, body)
            self.queue.forget(key)
            return
        self.objects.put(v1alpha1.KIND, body)
        self.queue.add(key)

    def note_child(self, child: str, kind: str | None, body: cache.Object) -> None:
        """Take over an event of a child."""
        if kind == "DELETED":
            self.objects.remove(child, body)
        else:
            self.objects.put(child, body)
        for key in self.objects.resources_of(child, body):
            if self.objects.get(v1alpha1.KIND, key):
                self.queue.add(key)

    async def reconcile(self, key: cache.ObjectKey) -> float | None:
        """Work on one key."""
        body = self.objects.get(v1alpha1.KIND, key)
        if body is None or self.client is None:
            return None
        observation = self._observe(body)
        return await reconcile.reconcile(
            observation, kube=self.client, defaults=self.defaults, progress=self.progress
        )

    async def _list_children(self) -> None:
        if self.client is None:
            return
        for kind, child in CHILDREN.items():
            for namespace in self.defaults.namespaces or (None,):
                bodies, version = await self.client.list_all(
                    child.api_version, kind, namespace=namespace, selector=child.selector
                )
                self.objects.replace_all(kind, bodies, namespace=namespace, version=version)

    async def _list_children_again(self) -> None:
        """Drop what was deleted between the first listing and the begin of the watches."""
        is_listed = False
        while not is_listed:
            await asyncio.sleep(_SECOND_LISTING_SECONDS)
            with contextlib.suppress(errors.KubeError):
                await self._list_children()
                is_listed = True
        for key in self.objects.keys(v1alpha1.KIND):
            self.queue.add(key)

    def _remember(self, body: cache.Object) -> None:
        if body["kind"] in (*CHILDREN, v1alpha1.KIND):
            self.objects.put(body["kind"], body)

    def _observe(self, body: cache.Object) -> observe.Observation:
        resource = v1alpha1.Resource.model_validate(body)
        key = cache.key_of(body)
        pods = self.objects.list_in("Pod", key.namespace)
        claim_name = resource.spec.cache.claim_name or self.defaults.cache_claim_name
        found = [
            observe.Job(body=job, pods=observe.select(pods, _belongs_to_job(job)))
            for job in self.objects.list_in("Job", key.namespace)
        ]
        return observe.Observation(
            resource=resource,
            claim=self.objects.get(
                "PersistentVolumeClaim", cache.ObjectKey(key.namespace, claim_name)
            ),
            jobs={job.name: job for job in found},
            deployment=self.objects.get("Deployment", key),
            service=self.objects.get("Service", key),
            pods=observe.select(pods, _serves(key.name)),
        )


def register(registry: kopf.OperatorRegistry) -> None:
    """Register every handler."""
    kopf.on.login(registry=registry)(kopf.login_via_client)
    kopf.on.startup(registry=registry)(_start)
    kopf.on.cleanup(registry=registry)(_stop)
    kopf.on.event(v1alpha1.GROUP, v1alpha1.VERSION, v1alpha1.PLURAL, registry=registry)(
        _on_resource
    )
    for kind, child in CHILDREN.items():
        kopf.on.event(
            child.group, "v1", child.plural, registry=registry, param=kind, id=f"on-{child.plural}"
        )(_on_child)


async def _start(settings: kopf.OperatorSettings, memo: Any, **_: Any) -> None:
    settings.posting.enabled = False
    settings.peering.standalone = True
    settings.scanning.disabled = True
    settings.watching.server_timeout = 600
    settings.watching.client_timeout = 610
    settings.watching.connect_timeout = 10
    settings.networking.request_timeout = 60
    settings.queueing.idle_timeout = 0.5
    for child in CHILDREN.values():
        if child.selector:
            settings.watching.label_selectors[child.group, "v1", child.plural] = child.selector
    settings.process.ultimate_exiting_timeout = 25
    await memo.controller.start()


async def _stop(memo: Any, **_: Any) -> None:
    await memo.controller.stop()


async def _on_resource(event: Any, body: Any, memo: Any, **_: Any) -> None:
    memo.controller.note_resource(event["type"], dict(body))


async def _on_child(event: Any, body: Any, memo: Any, param: Any = None, **_: Any) -> None:
    memo.controller.note_child(param, event["type"], dict(body))


def _belongs_to_job(job: cache.Object) -> Any:
    name = job["metadata"]["name"]
    return lambda pod: pod["metadata"].get("labels", {}).get(cache.JOB_NAME_LABEL) == name


def _serves(instance: str) -> Any:
    def matches(pod: cache.Object) -> bool:
        labels = pod["metadata"].get("labels", {})
        is_instance = labels.get(cache.INSTANCE_LABEL) == instance
        return is_instance and cache.JOB_NAME_LABEL not in labels

    return matches
