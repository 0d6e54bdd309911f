import dataclasses
import json

import pytest
from internvl_operator import observe, plan, reconcile
from internvl_operator.resources import jobs, naming, serving

CLAIM = {"metadata": {"name": "internvl-cache", "uid": "claim-1"}}
WEIGHTS = "a" * 64


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
    return {"weights": WEIGHTS, "dimensions": {}, "checkpoints": [], "engines": [], **published}


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
    assert stages[1:] == [jobs.checkpoint_name(keys.checkpoint), jobs.engine_name(keys.engine)]
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
    world.change(jobs={}, claim={"metadata": {"name": "internvl-cache", "uid": "claim-2"}})

    (manifest,) = created(world.decide())

    assert manifest["metadata"]["name"].startswith("ivl-resolve-")


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
