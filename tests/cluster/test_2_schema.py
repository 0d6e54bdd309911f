"""The API server refuses bad manifests, with messages that say what to do."""

import pytest
from cluster_client import tiny_spec
from local_cluster import steps

EITHER = "exactly one of spec.model.source.bundled, synthetic and persistentVolumeClaim must be set"
TINY = {"shape": "tiny", "family": "qwen2"}
REFUSED = {
    "no source": ("demo", {"model": {"source": {}}}, EITHER),
    "two sources": (
        "demo",
        {"model": {"source": {"synthetic": TINY, "persistentVolumeClaim": {"claimName": "x"}}}},
        EITHER,
    ),
    "name with a digit in front": ("1demo", tiny_spec(), "for example internvl2-5-8b"),
    "name with a dot": ("a.b", tiny_spec(), "for example internvl2-5-8b"),
    "name of 41 characters": ("a" * 41, tiny_spec(), "at most 40 characters"),
    "unknown dtype": (
        "demo",
        {**tiny_spec(), "engine": {"dtype": "int4"}},
        'supported values: "bfloat16", "float16", "float32"',
    ),
    "sequence beyond the models": (
        "demo",
        {**tiny_spec(), "engine": {"maxSequenceTokens": 36960}},
        "should be less than or equal to 32768",
    ),
    "path out of the claim": (
        "demo",
        {"model": {"source": {"persistentVolumeClaim": {"claimName": "x", "path": "../y"}}}},
        "path must stay inside the claim",
    ),
    "unknown family": (
        "demo",
        {"model": {"source": {"synthetic": {"shape": "tiny", "family": "llama"}}}},
        'supported values: "qwen2", "internlm2"',
    ),
    "no model": ("demo", {}, "spec.model: Required value"),
}


@pytest.mark.ci
@pytest.mark.parametrize("case", REFUSED)
def test_a_bad_manifest_is_refused_with_its_message(client, case):
    name, spec, message = REFUSED[case]

    with pytest.raises(steps.ClusterError) as caught:
        client.apply_model(name, spec)

    assert message in str(caught.value)


@pytest.mark.ci
def test_an_unknown_field_is_refused(client):
    spec = {**tiny_spec(), "engin": {"dtype": "float32"}}
    with pytest.raises(steps.ClusterError, match="engin"):
        client.apply_model("demo", spec)
