import dataclasses
import json

import pytest
from internvl_operator import catalog, errors, observe, plan, reconcile
from internvl_operator.resources import jobs, naming, serving

CLAIM = {"metadata": {"name": "internvl-cache", "uid": "claim-1"}}
WEIGHTS = "a" * 64
TINY = {"shape": "tiny", "family": "qwen2"}


class World:
    """A cluster that does at once what the decisions ask for, for one resource."""

    def __init__(self, resource, defaults):
        self.defaults = defaults
        self.observation = observe.Observation(
            resource=resource, claim=None, jobs={}, deployment=None, service=None, pods=()
        )

    def change(self, **fields):
        self.observation = dataclasses.replace(self.observation, **fields)

    def decide(self):
        decision = reconcile.decide(self.observation, defaults=self.defaults)
        status = dict(decision.status)
        resource = self.observation.resource.model_copy(update={"status": status})
        self.change(resource=resource)
        return decision

    def add_job(self, manifest, *, condition=None, message=None, exit_code=0, progress=None):
        name = manifest["metadata"]["name"]
        conditions = [{"type": condition, "status": "True"}] if condition else []
        body = {**manifest, "status": {"conditions": conditions}}
        ended = {"exitCode": exit_code, "message": json.dumps(message) if message else ""}
        statuses = [{"name": "c", "state": {"terminated": ended}}] if condition else []
        pod = {"metadata": {"name": f"{name}-x"}, "status": {"containerStatuses": statuses}}
        job = observe.Job(body=body, pods=(pod,), progress=progress)
        self.change(jobs={**self.observation.jobs, name: job})

    def finish(self, manifest, result=None):
        message = {"result": result or {}}
        self.add_job(manifest, condition="Complete", message=message)

    def apply(self, actions):
        for action in actions:
            manifest = action.manifest
            kind = {"Deployment": "deployment", "Service": "service"}[manifest["kind"]]
            manifest["metadata"]["generation"] = 1
            self.change(**{kind: manifest})


def created(decision):
    return [a.manifest for a in decision.actions if isinstance(a, reconcile.Create)]


def condition(decision, kind):
    return next(c for c in decision.conditions if c.type == kind)


def resolved(**published):
    return {
        "weights": WEIGHTS,
        "dimensions": {"hidden_size": 128, "vocab_size": 405},
        "checkpoints": [],
        "engines": [],
        **published,
    }


@pytest.fixture
def world(make_resource, defaults):
    return World(make_resource(), defaults)


@pytest.fixture
def keys(make_resource, defaults):
    made = plan.make_plan(make_resource(), defaults=defaults)
    return plan.plan_keys(made, weights=WEIGHTS)


def walk_to_engine(world):
    world.change(claim=CLAIM)
    world.finish(created(world.decide())[0], resolved())
    world.finish(created(world.decide())[0])
    return created(world.decide())[0]


def walk_to_serving(world):
    world.finish(walk_to_engine(world))
    world.apply(world.decide().actions)


def make_ready(world):
    deployment = dict(world.observation.deployment)
    deployment["status"] = {
        "observedGeneration": 1, "replicas": 1, "updatedReplicas": 1, "availableReplicas": 1,
        "readyReplicas": 1,
    }  # fmt: skip
    world.change(deployment=deployment)


def test_the_claim_comes_first(world):
    decision = world.decide()

    (manifest,) = created(decision)
    assert manifest["kind"] == "PersistentVolumeClaim"
    assert "ownerReferences" not in manifest["metadata"]
    assert condition(decision, "Ready").status is False


def test_each_stage_begins_when_the_one_before_has_ended(world, keys):
    world.change(claim=CLAIM)
    stages = []
    for result in (resolved(), None, None):
        (manifest,) = created(world.decide())
        stages.append(manifest["metadata"]["name"])
        world.finish(manifest, result)

    assert stages[0].startswith("ivl-resolve-")
    assert stages[1:] == [
        jobs.checkpoint_name(keys.checkpoint, claim_uid="claim-1"),
        jobs.engine_name(keys.engine, claim_uid="claim-1"),
    ]
    actions = world.decide().actions
    assert [a.manifest["kind"] for a in actions] == ["Deployment", "Service"]


def test_ready_is_true_when_the_deployment_is(world):
    walk_to_serving(world)
    assert world.decide().status["phase"] == "Starting"

    make_ready(world)
    decision = world.decide()

    assert decision.status["phase"] == "Ready"
    assert condition(decision, "Ready").status is True
    assert decision.status["serving"]["endpoint"] == "http://demo.ns.svc:8000/v1"


def test_a_second_decision_on_the_same_world_changes_nothing(world):
    walk_to_serving(world)
    make_ready(world)

    first, second = world.decide(), world.decide()

    assert first.actions == second.actions == ()
    assert first.status == second.status


def test_a_running_job_is_waited_for_with_its_progress(world):
    engine = walk_to_engine(world)
    progress = observe.Progress(stage="build", step="verify", done=1, total=4)
    world.add_job(engine, progress=progress)

    decision = world.decide()

    assert decision.is_building
    assert created(decision) == []
    assert decision.status["build"]["progress"] == "verify 25%"
    assert condition(decision, "EngineReady").reason == "Building"


@pytest.mark.parametrize("child", ["deployment", "service"])
def test_a_deleted_child_is_made_again(world, child):
    walk_to_serving(world)
    make_ready(world)
    world.change(**{child: None})

    (action,) = world.decide().actions

    assert action.manifest["kind"].lower() == child


def test_a_changed_child_is_put_right(world):
    walk_to_serving(world)
    make_ready(world)
    service = json.loads(json.dumps(world.observation.service))
    service["spec"]["ports"][0]["port"] = 1
    world.change(service=service)

    (action,) = world.decide().actions

    assert action.manifest["spec"]["ports"][0]["port"] == serving.HTTP_PORT


def test_finished_jobs_may_vanish_without_a_new_build(world):
    walk_to_serving(world)
    make_ready(world)
    world.change(jobs={})

    assert world.decide().actions == ()


def test_a_published_engine_starts_no_build(world, keys):
    world.change(claim=CLAIM)
    published = resolved(checkpoints=[keys.checkpoint], engines=[keys.engine])
    world.finish(created(world.decide())[0], published)

    actions = world.decide().actions

    assert [a.manifest["kind"] for a in actions] == ["Deployment", "Service"]


def test_a_lost_claim_means_to_build_again(world):
    walk_to_serving(world)
    make_ready(world)
    finished = set(world.observation.jobs)
    world.change(claim={"metadata": {"name": "internvl-cache", "uid": "claim-2"}})

    for result in (resolved(), None, None):
        (manifest,) = created(world.decide())
        assert manifest["metadata"]["name"] not in finished
        world.finish(manifest, result)


def test_a_new_release_of_the_operator_touches_nothing_that_runs(world, monkeypatch):
    walk_to_serving(world)
    make_ready(world)
    world.decide()
    newer = catalog.Release(versions={"torch": "3.0"}, converter_format=2, engine_format=2)
    monkeypatch.setitem(catalog.RELEASES, "PyTorch", newer)

    assert world.decide().actions == ()


def test_an_upgrade_to_a_new_release_builds_before_it_serves(world, monkeypatch, make_resource):
    walk_to_serving(world)
    make_ready(world)
    status = world.decide().status
    newer = catalog.Release(versions={"torch": "3.0"}, converter_format=1, engine_format=1)
    monkeypatch.setitem(catalog.RELEASES, "PyTorch", newer)
    annotations = {"serving.internvl.dev/upgrade": "now"}
    world.change(resource=make_resource(status=dict(status), annotations=annotations))

    (manifest,) = created(world.decide())

    assert manifest["metadata"]["name"].startswith("ivl-engine-")


def test_a_build_that_is_still_wanted_survives_a_change_of_the_spec(world, make_resource):
    world.change(claim=CLAIM)
    world.finish(created(world.decide())[0], resolved())
    (checkpoint,) = created(world.decide())
    world.add_job(checkpoint)
    status = world.decide().status
    fewer = {"multimodal": {"maxTilesPerRequest": 26}}
    world.change(resource=make_resource(fewer, status=dict(status), generation=2))

    decision = world.decide()
    assert [type(action) for action in decision.actions] == [reconcile.Create]
    world.finish(created(decision)[0], resolved())

    assert world.decide().actions == ()


def test_an_invalid_edit_and_its_revert_change_nothing(world, make_resource):
    engine = walk_to_engine(world)
    world.add_job(engine)
    status = world.decide().status
    bad = make_resource({"engine": {"device": "CUDA"}}, status=dict(status), generation=2)
    world.change(resource=bad)
    status = world.decide().status
    world.change(resource=make_resource(status=dict(status), generation=3))

    assert world.decide().actions == ()


def test_a_changed_source_is_resolved_again(world):
    world.change(claim=CLAIM)
    world.finish(created(world.decide())[0], resolved())
    (checkpoint,) = created(world.decide())
    message = {"reason": "DigestMismatch", "message": "other weights", "remedy": "wait"}
    world.add_job(checkpoint, condition="Failed", message=message, exit_code=80)

    assert "keys" not in world.decide().status


def test_weights_of_another_model_are_refused_once(make_resource, defaults):
    spec = {"model": {"name": "InternVL2_5-1B", "source": {"synthetic": TINY}}}
    world = World(make_resource(spec), defaults)
    world.change(claim=CLAIM)
    world.finish(created(world.decide())[0], resolved())
    assert condition(world.decide(), "Validated").reason == "UnsupportedModel"

    world.change(jobs={})
    decision = world.decide()

    assert decision.actions == ()
    assert condition(decision, "Ready").reason == "UnsupportedModel"


def test_zero_replicas_are_no_start_that_never_ends(world):
    walk_to_serving(world)
    deployment = {**world.observation.deployment, "status": {"observedGeneration": 1}}
    deployment["spec"] = {**deployment["spec"], "replicas": 0}
    world.change(deployment=deployment)

    assert world.decide().status["phase"] == "ScaledToZero"


class FakeKube:
    """Answers as an API server that refuses, or holds someone else's objects."""

    def __init__(self, *, refusal=None, found=None):
        self.refusal, self.found = refusal, found
        self.statuses, self.events, self.logs_read = [], [], 0

    async def find(self, manifest):
        return self.found

    async def apply(self, manifest):
        raise AssertionError("not to be applied")

    async def create(self, manifest):
        raise self.refusal

    async def apply_status(self, resource, status):
        self.statuses.append(status)

    async def post_event(self, resource, event):
        self.events.append(event)

    async def read_log(self, pod, *, container, lines):
        self.logs_read += 1
        return '{"stage": "convert", "step": "convert", "done": 1, "total": 2, "unit": "bytes"}'


async def reconcile_once(world, kube):
    return await reconcile.reconcile(
        world.observation,
        kube=kube,
        defaults=world.defaults,
        progress=reconcile.ProgressReader(),
    )


@pytest.mark.parametrize(
    ("message", "reason"),
    [("exceeded quota: small", "QuotaExceeded"), ("size must be positive", "InvalidSpec")],
)
async def test_what_the_api_server_refuses_is_told(world, message, reason):
    kube = FakeKube(refusal=errors.KubeError(403, message))

    with pytest.raises(errors.KubeError):
        await reconcile_once(world, kube)

    ready = kube.statuses[-1]["conditions"][-1]
    assert (ready["type"], ready["reason"], ready["message"]) == ("Ready", reason, message)
    assert kube.events[-1].is_warning


async def test_someone_elses_deployment_is_not_taken_over(world):
    world.finish(walk_to_engine(world))
    foreign = {"kind": "Deployment", "metadata": {"name": "demo"}}
    kube = FakeKube(found=foreign)

    with pytest.raises(errors.NameTakenError):
        await reconcile_once(world, kube)

    assert kube.statuses[-1]["conditions"][-1]["reason"] == "NameTaken"


async def test_a_log_is_read_at_most_every_few_seconds():
    times = iter([0.0, 0.0, 1.0, 4.9, 5.0, 5.0])
    reader = reconcile.ProgressReader(clock=lambda: next(times))
    kube = FakeKube()
    running = [{"name": "convert", "state": {"running": {}}}]
    pod = {"metadata": {"name": "p"}, "status": {"containerStatuses": running}}
    job = observe.Job(body={"metadata": {"name": "j"}}, pods=(pod,))

    read = [await reader.read(job, kube) for _ in range(4)]

    assert kube.logs_read == 2
    assert [progress.percent for progress in read] == [50] * 4


def test_a_lost_result_means_to_resolve_again(world):
    world.change(claim=CLAIM)
    world.add_job(created(world.decide())[0], condition="Complete")

    (action,) = world.decide().actions

    assert isinstance(action, reconcile.Delete)


def test_a_failed_build_is_told_with_reason_and_remedy(world):
    world.change(claim=CLAIM)
    message = {"reason": "DigestMismatch", "message": "a.safetensors is cut", "remedy": "copy it"}
    world.add_job(created(world.decide())[0], condition="Failed", message=message, exit_code=80)

    decision = world.decide()

    ready = condition(decision, "Ready")
    assert (decision.status["phase"], ready.reason) == ("Failed", "DigestMismatch")
    assert ready.message == "a.safetensors is cut: copy it"
    assert created(decision) == []


def test_an_invalid_spec_touches_nothing_that_runs(world, make_resource):
    walk_to_serving(world)
    make_ready(world)
    world.change(resource=make_resource({"engine": {"backend": "TensorRT"}}, generation=2))

    decision = world.decide()

    assert decision.actions == ()
    assert condition(decision, "Validated").reason == "InvalidSpec"
    assert decision.status["serving"]["readyReplicas"] == 1


def test_a_job_of_another_resource_is_adopted(world, make_resource):
    world.change(claim=CLAIM)
    (manifest,) = created(world.decide())
    other = naming.owner_reference(make_resource(name="other"), is_controller=False)
    world.add_job({**manifest, "metadata": {**manifest["metadata"], "ownerReferences": [other]}})

    (action,) = world.decide().actions

    assert [owner["name"] for owner in action.owners] == ["other", "demo"]


def test_a_build_that_nobody_waits_for_is_deleted(world, make_resource):
    engine = walk_to_engine(world)
    world.add_job(engine)
    status = world.observation.resource.status
    changed = make_resource({"engine": {"dtype": "float16"}}, status=status, generation=2)
    world.change(resource=changed)
    resolve = next(m for m in created(world.decide()))
    world.finish(resolve, resolved())

    deletions = [a for a in world.decide().actions if isinstance(a, reconcile.Delete)]

    assert [a.job.name for a in deletions] == [engine["metadata"]["name"]]


def test_an_incompatible_engine_is_told_at_the_first_exit(world):
    walk_to_serving(world)
    message = json.dumps({"reason": "EngineIncompatible", "message": "other torch", "remedy": "x"})
    ended = {"exitCode": 81, "message": message}
    status = {"name": "runtime", "ready": False, "state": {"terminated": ended}, "restartCount": 0}
    pod = {"metadata": {"name": "demo-x"}, "status": {"containerStatuses": [status]}}
    world.change(pods=(pod,))

    decision = world.decide()

    assert condition(decision, "RuntimeReady").reason == "EngineIncompatible"


def test_replicas_are_left_alone_unless_they_are_set(world):
    walk_to_serving(world)
    assert "replicas" not in world.observation.deployment["spec"]
