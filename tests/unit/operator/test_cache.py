import pytest
from internvl_operator.cache import ObjectCache, ObjectKey

OWNER = {"kind": "InternVLDeployment", "name": "demo"}


def body(name, *, version=1, uid="u", labels=None, owners=()):
    return {
        "metadata": {
            "name": name, "namespace": "ns", "uid": uid, "resourceVersion": str(version),
            "labels": labels or {}, "ownerReferences": list(owners),
        }
    }  # fmt: skip


@pytest.fixture
def cache():
    return ObjectCache(owner_kind="InternVLDeployment")


def test_an_older_version_does_not_replace_a_newer_one(cache):
    cache.put("Job", body("j", version=10))
    cache.put("Job", body("j", version=9))
    assert cache.get("Job", ObjectKey("ns", "j"))["metadata"]["resourceVersion"] == "10"


def test_a_listing_drops_what_is_gone_but_not_what_is_newer(cache):
    for name, version in (("gone", 3), ("stays", 4), ("newer", 9)):
        cache.put("Job", body(name, version=version))

    cache.replace_all("Job", [body("stays", version=5)], namespace=None, version=7)

    assert sorted(key.name for key in cache.keys("Job")) == ["newer", "stays"]


def test_a_new_object_of_the_same_name_replaces_the_old_one(cache):
    cache.put("Job", body("j", version=10))
    cache.put("Job", body("j", version=9, uid="other"))
    assert cache.get("Job", ObjectKey("ns", "j"))["metadata"]["uid"] == "other"


def test_a_jobs_pod_concerns_the_jobs_owners(cache):
    cache.put("Job", body("j", owners=[OWNER]))
    pod = body("p", labels={"batch.kubernetes.io/job-name": "j"})
    assert cache.resources_of("Pod", pod) == {ObjectKey("ns", "demo")}


def test_a_serving_pod_concerns_its_instance(cache):
    pod = body("p", labels={"app.kubernetes.io/instance": "demo"})
    assert cache.resources_of("Pod", pod) == {ObjectKey("ns", "demo")}


def test_a_claim_concerns_everyone_in_its_namespace(cache):
    cache.put("InternVLDeployment", body("demo"))
    assert cache.resources_of("PersistentVolumeClaim", body("c")) == {ObjectKey("ns", "demo")}
