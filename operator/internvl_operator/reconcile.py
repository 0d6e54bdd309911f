"""One idempotent step from what is to what should be.

`decide` is pure: an observation in, actions and a status out. `reconcile`
observes, decides and acts; running it again changes nothing.
"""

import contextlib
import dataclasses
import datetime
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from internvl_operator import catalog, conditions, diagnose, errors, keys, observe, settings
from internvl_operator import plan as plans
from internvl_operator.api import v1alpha1
from internvl_operator.conditions import Condition, Type
from internvl_operator.resources import Manifest, claim, differ, jobs, naming, serving

logger = logging.getLogger(__name__)

PROGRESS_INTERVAL_SECONDS = 5.0
"""How often a running build's log is read, and so the status written at most."""
_LOG_LINES = 5


@dataclasses.dataclass(frozen=True)
class Apply:
    """Create or change a child of one resource, by server-side apply."""

    manifest: Manifest
    is_new: bool
    """No child of ours is known: what has its name may be someone else's."""


@dataclasses.dataclass(frozen=True)
class Create:
    """Create a child that several resources share, unless it exists."""

    manifest: Manifest


@dataclasses.dataclass(frozen=True)
class SetOwners:
    """Write the full set of a Job's owners."""

    job: observe.Job
    owners: tuple[Manifest, ...]


@dataclasses.dataclass(frozen=True)
class Delete:
    """Remove a Job that nobody waits for."""

    job: observe.Job


Action = Apply | Create | SetOwners | Delete


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decision:
    """What to do about one observation."""

    actions: tuple[Action, ...]
    conditions: tuple[Condition, ...]
    status: Mapping[str, Any]
    """The status but for its conditions."""
    is_building: bool


class Kube(Protocol):
    """What `reconcile` asks of the API server."""

    async def apply(self, manifest: Manifest) -> None:
        """Create or change an object by server-side apply."""
        ...

    async def find(self, manifest: Manifest) -> observe.Object | None:
        """Return what has a manifest's kind and name, None if nothing has."""
        ...

    async def create(self, manifest: Manifest) -> None:
        """Create an object; raises KubeConflictError when it exists."""
        ...

    async def set_owners(self, body: observe.Object, owners: tuple[Manifest, ...]) -> None:
        """Replace an object's owner references if nobody else wrote meanwhile."""
        ...

    async def delete(self, body: observe.Object) -> None:
        """Delete an object and what it owns."""
        ...

    async def apply_status(self, resource: v1alpha1.Resource, status: Mapping[str, Any]) -> None:
        """Write a resource's status."""
        ...

    async def read_log(self, pod: observe.Object, *, container: str, lines: int) -> str:
        """Return the last lines of a container's log."""
        ...

    async def post_event(self, resource: v1alpha1.Resource, event: conditions.Event) -> None:
        """Tell of a change."""
        ...


class ProgressReader:
    """Reads the progress lines of running builds, each at most every few seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._read: dict[str, tuple[float, observe.Progress | None]] = {}

    async def read(self, job: observe.Job, kube: Kube) -> observe.Progress | None:
        """Return the last progress of a Job that has a running container."""
        pod = job.pods[-1] if job.pods else None
        container = observe.running_container(pod) if pod else None
        if pod is None or container is None:
            self._read.pop(job.name, None)
            return None
        read_at, progress = self._read.get(job.name, (float("-inf"), None))
        if self._clock() - read_at >= PROGRESS_INTERVAL_SECONDS:
            with contextlib.suppress(errors.KubeError):
                log = await kube.read_log(pod, container=container, lines=_LOG_LINES)
                progress = observe.parse_progress(log) or progress
            self._read[job.name] = (self._clock(), progress)
        return progress


async def reconcile(
    observation: observe.Observation,
    *,
    kube: Kube,
    defaults: settings.Settings,
    progress: ProgressReader,
) -> float | None:
    """Bring one resource forward; returns after how many seconds to look again, if at all.

    What the API server refuses becomes the condition `Ready`, and the error is
    raised for the queue to try again.
    """
    if observation.resource.metadata.deletion_timestamp:
        return None
    observation = await _with_progress(observation, progress, kube)
    decision = decide(observation, defaults=defaults)
    try:
        for action in decision.actions:
            await _act(action, observation.resource, kube)
    except errors.KubeConflictError:
        raise
    except errors.KubeError as e:
        if e.is_refusal:
            await _write_status(observation.resource, _refused(decision, e), kube)
        raise
    await _write_status(observation.resource, decision, kube)
    return PROGRESS_INTERVAL_SECONDS if decision.is_building else None


def decide(observation: observe.Observation, *, defaults: settings.Settings) -> Decision:
    """Decide what an observation asks for."""
    try:
        plan = plans.make_plan(observation.resource, defaults=defaults)
        return _Path(observation, plan, defaults).walk()
    except errors.SpecError as e:
        failed = _not(Type.VALIDATED, e.reason, e.message, is_failure=True)
        before = observation.resource.status
        kept: dict[str, Any] = {x: before[x] for x in ("resolved", "keys") if x in before}
        return Decision(
            actions=(),
            conditions=(failed, conditions.roll_up([failed])),
            status={"phase": "Invalid", **kept, **_serving_status(observation)},
            is_building=False,
        )


class _Path:
    """The way from a manifest to an answer, walked as far as the cluster is.

    Each stage returns whether the next may begin, and leaves behind a
    condition and the actions that bring it forward.
    """

    def __init__(
        self, observation: observe.Observation, plan: plans.Plan, defaults: settings.Settings
    ) -> None:
        self._seen = observation
        self._resource = observation.resource
        self._plan = plan
        self._images = plans.choose_images(observation.resource, defaults=defaults)
        self._context = jobs.JobContext(
            resource=observation.resource,
            plan=plan,
            images=self._images,
            claim_uid=self._claim_uid(),
            defaults=defaults,
        )
        self._defaults = defaults
        self._actions: list[Action] = []
        self._conditions = [_is(Type.VALIDATED, "Valid", "the spec can be served")]
        self._wanted_jobs: set[str] = set()
        self._known = self._read_known()
        self._phase = "Pending"
        self._active: observe.Job | None = None
        self._is_outdated = False
        """What was recorded about the source does not hold any more: resolve it again."""

    def walk(self) -> Decision:
        """Walk as far as possible."""
        weights = self._resolve()
        addresses = plans.plan_keys(self._plan, weights=weights) if weights else None
        if addresses and self._is_named_model():
            self._forget_other(addresses)
            if self._make_checkpoint(addresses) and self._make_engine(addresses):
                self._serve(addresses)
            self._leave_unwanted_jobs()
        self._fill_conditions()
        ready = conditions.roll_up(self._conditions)
        return Decision(
            actions=tuple(self._actions),
            conditions=(*self._conditions, ready),
            status=self._status(addresses),
            is_building=self._active is not None,
        )

    def _read_known(self) -> Mapping[str, Any]:
        """Return what earlier walks have recorded, if it is about the same request and claim."""
        recorded: Mapping[str, Any] = self._resource.status.get("keys", {})
        is_same = recorded.get("request") == self._plan.request
        return recorded if is_same and recorded.get("claim") == self._claim_uid() else {}

    def _claim_uid(self) -> str:
        return str(self._seen.claim["metadata"]["uid"]) if self._seen.claim else ""

    def _resolve(self) -> str | None:
        if self._seen.claim is None:
            manifest = claim.build_claim(self._resource, self._plan, defaults=self._defaults)
            self._actions.append(Create(manifest))
            return None
        if self._known.get("weights"):
            return str(self._known["weights"])
        request = keys.short_hash([self._plan.request, self._claim_uid()])
        name = jobs.resolve_name(request)
        job = self._run(name, jobs.build_resolve_job(self._context, name=name))
        self._phase = "Resolving"
        if job is None or not job.is_finished:
            self._note(Type.WEIGHTS_READY, job, "Resolving", "finding out what the source holds")
            return None
        result = job.result()
        if result is None:
            self._actions.append(Delete(job))
            return None
        self._known = self._published_of(result)
        return str(result["weights"])

    def _is_named_model(self) -> bool:
        """Whether the weights are of the model that the spec names, if it names one."""
        try:
            plans.check_dimensions(
                self._resource.spec.model.name, self._known.get("dimensions", {})
            )
        except errors.SpecError as e:
            self._phase = "Invalid"
            self._conditions = [_not(Type.VALIDATED, e.reason, e.message, is_failure=True)]
            return False
        return True

    def _forget_other(self, addresses: plans.EngineKeys) -> None:
        """Believe what is recorded as published only if it is what is wanted now."""
        known = dict(self._known)
        for flag, field in (("hasCheckpoint", "checkpoint"), ("hasEngine", "engine")):
            is_wanted = known.get(field) == getattr(addresses, field)
            known[flag] = bool(known.get(flag)) and is_wanted
        self._known = known

    def _published_of(self, result: Mapping[str, Any]) -> dict[str, Any]:
        addresses = plans.plan_keys(self._plan, weights=str(result["weights"]))
        return {
            **dataclasses.asdict(addresses),
            "dimensions": _identifying(result.get("dimensions", {})),
            "hasCheckpoint": addresses.checkpoint in result.get("checkpoints", ()),
            "hasEngine": addresses.engine in result.get("engines", ()),
        }

    def _make_checkpoint(self, addresses: plans.EngineKeys) -> bool:
        if self._known.get("hasCheckpoint") or self._known.get("hasEngine"):
            return self._weights_are_ready()
        manifest = jobs.build_checkpoint_job(self._context, addresses)
        job = self._run(manifest["metadata"]["name"], manifest)
        if job is not None and job.is_finished:
            self._known = {**self._known, "hasCheckpoint": True}
            return self._weights_are_ready()
        self._phase = "Converting"
        self._note(Type.WEIGHTS_READY, job, "Converting", "fetching and converting the weights")
        return False

    def _weights_are_ready(self) -> bool:
        self._conditions.append(
            _is(Type.WEIGHTS_READY, "Published", "the converted checkpoint is in the cache")
        )
        return True

    def _make_engine(self, addresses: plans.EngineKeys) -> bool:
        if not self._known.get("hasEngine"):
            manifest = jobs.build_engine_job(self._context, addresses)
            job = self._run(manifest["metadata"]["name"], manifest)
            if job is None or not job.is_finished:
                self._phase = "Building"
                self._note(Type.ENGINE_READY, job, "Building", "building and verifying the engine")
                return False
            self._known = {**self._known, "hasEngine": True}
        self._conditions.append(
            _is(Type.ENGINE_READY, "Published", f"engine {addresses.engine[:12]} is in the cache")
        )
        return True

    def _serve(self, addresses: plans.EngineKeys) -> None:
        deployment = serving.build_deployment(
            self._resource,
            self._plan,
            keys=addresses,
            images=self._images,
            defaults=self._defaults,
        )
        service = serving.build_service(self._resource)
        for manifest, live in (
            (deployment, self._seen.deployment),
            (service, self._seen.service),
        ):
            if live is None or differ.differs(manifest, live):
                self._actions.append(Apply(manifest, is_new=live is None))
        self._conditions.append(self._judge_serving())

    def _judge_serving(self) -> Condition:
        self._phase = "Starting"
        finding = diagnose.diagnose_serving(self._seen.pods)
        if observe.is_deployment_ready(self._seen.deployment) and not self._actions:
            if observe.is_scaled_to_zero(self._seen.deployment):
                self._phase = "ScaledToZero"
                return _not(Type.RUNTIME_READY, "ScaledToZero", "0 replicas are wanted")
            self._phase = "Ready"
            ready = f"{self._ready_replicas()} replicas are ready"
            return _is(Type.RUNTIME_READY, "Serving", ready)
        if finding:
            return _not(Type.RUNTIME_READY, finding.reason, finding.message, is_failure=True)
        return _not(Type.RUNTIME_READY, "Starting", "the runtime is loading the engine")

    def _run(self, name: str, manifest: Manifest) -> observe.Job | None:
        """Want a Job: create it, adopt it, or take it as it is."""
        self._wanted_jobs.add(name)
        job = self._seen.jobs.get(name)
        if job is None:
            self._actions.append(Create(manifest))
            return None
        if not _is_owner(self._resource, job):
            reference = naming.owner_reference(self._resource, is_controller=False)
            owners = (*map(dict, job.owners), reference)
            self._actions.append(SetOwners(job, owners))
        return job

    def _note(self, type_: Type, job: observe.Job | None, reason: str, message: str) -> None:
        """Add the condition of a Job that is not finished."""
        if job is not None and job.is_failed:
            finding = diagnose.diagnose_job(job)
            self._phase = "Failed"
            self._conditions.append(_not(type_, finding.reason, finding.message, is_failure=True))
            self._is_outdated = finding.reason is errors.Reason.DIGEST_MISMATCH
            return
        self._active = job
        waiting = diagnose.diagnose_waiting(job.pods[-1]) if job and job.pods else None
        if waiting:
            self._conditions.append(_not(type_, waiting.reason, waiting.message, is_failure=True))
        else:
            self._conditions.append(_not(type_, reason, message))

    def _leave_unwanted_jobs(self) -> None:
        """Give up Jobs of an earlier spec; the last owner deletes a Job that still runs."""
        for job in self._seen.jobs.values():
            is_over = job.is_finished or job.is_failed
            if job.name in self._wanted_jobs or is_over or not _is_owner(self._resource, job):
                continue
            others = tuple(dict(o) for o in job.owners if o["uid"] != self._resource.metadata.uid)
            self._actions.append(SetOwners(job, others) if others else Delete(job))

    def _fill_conditions(self) -> None:
        present = {condition.type for condition in self._conditions}
        for type_ in (Type.WEIGHTS_READY, Type.ENGINE_READY, Type.RUNTIME_READY):
            if type_ not in present:
                self._conditions.append(
                    Condition(type=type_, status=None, reason="Waiting", message="not begun yet")
                )

    def _status(self, addresses: plans.EngineKeys | None) -> dict[str, Any]:
        plan = self._plan
        status: dict[str, Any] = {
            "phase": self._phase,
            "resolved": {
                "backend": plan.backend,
                "device": plan.device,
                "model": self._resource.spec.model.name or _model_label(plan.source),
                "images": dataclasses.asdict(self._images),
                "release": plan.release.to_status(),
                "imageRevision": plans.image_revision(self._resource),
                "gpus": 0,
                "buildFlags": dict(plan.build_flags),
            },
            **_serving_status(self._seen),
        }
        if addresses and not self._is_outdated:
            known = {x: bool(self._known.get(x)) for x in ("hasCheckpoint", "hasEngine")}
            status["keys"] = {
                "request": plan.request,
                "claim": self._claim_uid(),
                **dataclasses.asdict(addresses),
                **known,
                "dimensions": self._known.get("dimensions", {}),
            }
        if self._active:
            status["build"] = _build_status(self._active)
        return status

    def _ready_replicas(self) -> int:
        deployment = self._seen.deployment or {}
        return int(deployment.get("status", {}).get("readyReplicas", 0))


def _build_status(job: observe.Job) -> dict[str, Any]:
    progress = job.progress
    described: dict[str, Any] = {"job": job.name}
    if job.started_at:
        described["startedAt"] = job.started_at
    if progress:
        described |= {
            "stage": progress.stage,
            "step": progress.step,
            "percent": progress.percent,
            "progress": f"{progress.step} {progress.percent}%",
        }
    return described


def _serving_status(observation: observe.Observation) -> dict[str, Any]:
    deployment = observation.deployment
    if deployment is None:
        return {"replicas": 0}
    name = observation.resource.metadata.name
    selector = ",".join(f"{k}={v}" for k, v in sorted(serving.selector_for(name).items()))
    template = deployment["spec"]["template"]["metadata"].get("annotations", {})
    return {
        "replicas": deployment.get("status", {}).get("replicas", 0),
        "selector": selector,
        "serving": {
            "engineKey": template.get(naming.KEY_ANNOTATION, ""),
            "readyReplicas": deployment.get("status", {}).get("readyReplicas", 0),
            "endpoint": serving.endpoint_of(observation.resource),
        },
    }


def _identifying(dimensions: Mapping[str, Any]) -> dict[str, Any]:
    """Return the dimensions that tell one published model from another."""
    fields = [field.name for field in dataclasses.fields(catalog.Dimensions)]
    return {field: dimensions[field] for field in fields if field in dimensions}


def _refused(decision: Decision, error: errors.KubeError) -> Decision:
    """Return a decision whose `Ready` says what the API server has refused."""
    is_quota = "exceeded quota" in error.message
    reason = errors.Reason.QUOTA_EXCEEDED if is_quota else errors.Reason.INVALID_SPEC
    if isinstance(error, errors.NameTakenError):
        reason = errors.Reason.NAME_TAKEN
    ready = _not(Type.READY, reason, error.message, is_failure=True)
    others = [condition for condition in decision.conditions if condition.type is not Type.READY]
    status = {**decision.status, "phase": "Failed"}
    return dataclasses.replace(decision, conditions=(*others, ready), status=status)


def _model_label(source: Mapping[str, Any]) -> str:
    if "bundled" in source:
        return str(source["bundled"]["name"])
    if "synthetic" in source:
        return f"synthetic {source['synthetic']['shape']}"
    return str(source["folder"]["path"]).rpartition("/")[2]


def _is(type_: Type, reason: str, message: str) -> Condition:
    return Condition(type=type_, status=True, reason=reason, message=message)


def _not(type_: Type, reason: str, message: str, *, is_failure: bool = False) -> Condition:
    return Condition(
        type=type_, status=False, reason=str(reason), message=message, is_failure=is_failure
    )


def _is_owner(resource: v1alpha1.Resource, job: observe.Job) -> bool:
    return any(owner["uid"] == resource.metadata.uid for owner in job.owners)


async def _with_progress(
    observation: observe.Observation, progress: ProgressReader, kube: Kube
) -> observe.Observation:
    """Add the progress of each Job of this resource."""
    found = {
        name: dataclasses.replace(job, progress=await progress.read(job, kube))
        for name, job in observation.jobs.items()
        if _is_owner(observation.resource, job)
    }
    return dataclasses.replace(observation, jobs={**observation.jobs, **found})


async def _act(action: Action, resource: v1alpha1.Resource, kube: Kube) -> None:
    match action:
        case Apply(manifest, is_new):
            if is_new:
                _check_is_ours(await kube.find(manifest), resource)
            await kube.apply(manifest)
        case Create(manifest):
            try:
                await kube.create(manifest)
            except errors.KubeConflictError:
                logger.info("%s exists already", manifest["metadata"]["name"])
        case SetOwners(job, owners):
            await kube.set_owners(job.body, owners)
        case Delete(job):
            await kube.delete(job.body)


def _check_is_ours(live: observe.Object | None, resource: v1alpha1.Resource) -> None:
    """Refuse to take over what someone else has made; raises NameTakenError."""
    if live is None:
        return
    owners = live["metadata"].get("ownerReferences", ())
    if not any(o.get("controller") and o["uid"] == resource.metadata.uid for o in owners):
        raise errors.NameTakenError(
            f"{live['kind']} {live['metadata']['name']} exists and is not of this resource: "
            "remove it, or give the resource another name"
        )


async def _write_status(resource: v1alpha1.Resource, decision: Decision, kube: Kube) -> None:
    previous = resource.status.get("conditions", [])
    now = datetime.datetime.now(tz=datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    status = {
        "observedGeneration": resource.metadata.generation,
        **decision.status,
        "conditions": conditions.write(
            decision.conditions,
            previous=previous,
            generation=resource.metadata.generation,
            now=now,
        ),
    }
    if status == resource.status:
        return
    await kube.apply_status(resource, status)
    for event in conditions.list_transitions(decision.conditions, previous=previous):
        await kube.post_event(resource, event)
