import pytest
from internvl_operator import plan
from internvl_operator.resources import jobs, naming, serving


@pytest.fixture
def manifests(make_resource, defaults):
    resource = make_resource({"serving": {"replicas": 2}})
    made = plan.make_plan(resource, defaults=defaults)
    keys = plan.plan_keys(made, weights="a" * 64)
    images = plan.choose_images(resource, defaults=defaults)
    context = jobs.JobContext(
        resource=resource, plan=made, images=images, claim_uid="c", defaults=defaults
    )
    return {
        "resolve": jobs.build_resolve_job(context, name="ivl-resolve-x"),
        "checkpoint": jobs.build_checkpoint_job(context, keys),
        "engine": jobs.build_engine_job(context, keys),
        "deployment": serving.build_deployment(
            resource, made, keys=keys, images=images, defaults=defaults
        ),
    }


@pytest.mark.parametrize("name", ["resolve", "checkpoint", "engine", "deployment"])
def test_every_pod_fits_the_restricted_profile(manifests, name):
    pod = manifests[name]["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["automountServiceAccountToken"] is False
    for container in [*pod.get("initContainers", []), *pod["containers"]]:
        security = container["securityContext"]
        assert security["capabilities"] == {"drop": ["ALL"]}
        assert security["allowPrivilegeEscalation"] is False
        assert security["readOnlyRootFilesystem"] is True


@pytest.mark.parametrize("name", ["resolve", "checkpoint", "engine"])
def test_jobs_give_up_at_once_on_a_final_failure_and_ignore_evictions(manifests, name):
    ignore, fail = manifests[name]["spec"]["podFailurePolicy"]["rules"]
    assert ignore["onPodConditions"] == [{"type": "DisruptionTarget"}]
    assert fail["onExitCodes"] == {"operator": "In", "values": [80]}


def test_the_images_go_where_they_belong(manifests):
    def image(name):
        return manifests[name]["spec"]["template"]["spec"]["containers"][0]["image"]

    found = [image(name) for name in ("resolve", "checkpoint", "engine", "deployment")]
    assert found == ["tools:1", "tools:1", "builder:1", "runtime:1"]


def test_the_runtime_reads_the_cache_and_does_not_write_it(manifests):
    container = manifests["deployment"]["spec"]["template"]["spec"]["containers"][0]
    cache = next(mount for mount in container["volumeMounts"] if mount["name"] == "cache")
    assert cache["readOnly"] is True


def test_jobs_have_owners_that_are_no_controllers(manifests):
    (owner,) = manifests["engine"]["metadata"]["ownerReferences"]
    assert (owner["name"], owner["controller"]) == ("demo", False)


def test_a_long_name_is_hashed_to_63_characters():
    one, other = (naming.name_for("a" * 60, suffix) for suffix in ("bcd", "bce"))
    assert len(one) <= 63
    assert one != other
