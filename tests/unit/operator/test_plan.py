import pytest
from internvl_operator import errors, plan

SOURCE = {"synthetic": {"shape": "tiny", "family": "qwen2"}}
REFUSED = [
    ({"model": {"name": "InternVL9", "source": SOURCE}}, "'InternVL9'", "ModelNotFound"),
    ({"model": {"source": {}}}, "source is empty", "InvalidSpec"),
    ({"model": {"source": {"bundled": {"name": "cats"}}}}, "'cats': use one of", "ModelNotFound"),
    ({"model": {"source": {"synthetic": {"shape": "big"}}}}, "'big'", "ModelNotFound"),
    ({"model": {"source": {"synthetic": {"shape": "tiny"}}}}, "family is needed", "InvalidSpec"),
    ({"engine": {"backend": "TensorRT"}}, "TensorRT on CPU", "InvalidSpec"),
    ({"engine": {"device": "CUDA"}}, "PyTorch on CUDA", "InvalidSpec"),
    ({"engine": {"maxSequenceTokens": 600, "maxInputTokens": 600}}, "leaves 599", "InvalidSpec"),
    ({"multimodal": {"maxTilesPerRequest": 12}}, "its thumbnail", "InvalidSpec"),
]


@pytest.mark.parametrize(
    ("spec", "words", "reason"), REFUSED, ids=[words for _, words, _ in REFUSED]
)
def test_a_spec_that_can_not_be_served_is_refused(defaults, make_resource, spec, words, reason):
    with pytest.raises(errors.SpecError, match=words) as caught:
        plan.make_plan(make_resource(spec), defaults=defaults)
    assert caught.value.reason == reason


def test_build_flags_are_complete_after_defaulting(defaults, make_resource):
    made = plan.make_plan(make_resource(), defaults=defaults)
    assert made.build_flags == {
        "maxBatchSize": 16,
        "maxSequenceTokens": 32768,
        "maxInputTokens": 32767,
        "maxBatchedTokens": 8192,
        "maxTilesPerImage": 12,
        "maxTilesPerRequest": 52,
    }


def test_a_bundled_model_is_named_to_the_runtime(defaults, make_resource):
    source = {"bundled": {"name": "tiny-shapes"}}
    made = plan.make_plan(make_resource({"model": {"source": source}}), defaults=defaults)
    assert made.source == source
    assert made.source_claim is None


def test_a_claims_folder_is_where_the_pods_see_it(defaults, make_resource):
    claim = {"persistentVolumeClaim": {"claimName": "models", "path": "/a/b/"}}
    made = plan.make_plan(make_resource({"model": {"source": claim}}), defaults=defaults)
    assert made.source == {"folder": {"path": "/sources/models/a/b"}}
    assert made.source_claim == "models"


CHANGES = [
    ({"engine": {"dtype": "float16"}}, True),
    ({"engine": {"maxBatchSize": 4}}, True),
    ({"multimodal": {"maxTilesPerImage": 6}}, True),
    ({"serving": {"replicas": 3}}, False),
    ({"serving": {"servedModelNames": ["x"]}}, False),
    ({"cache": {"size": "1Gi"}}, False),
]


@pytest.mark.parametrize(("spec", "changes"), CHANGES, ids=str)
def test_only_what_is_executed_changes_the_engine_key(defaults, make_resource, spec, changes):
    def key(resource):
        made = plan.make_plan(resource, defaults=defaults)
        return plan.plan_keys(made, weights="w").engine

    assert (key(make_resource(spec)) != key(make_resource())) is changes


def test_names_of_the_resource_and_the_model_are_always_served(defaults, make_resource):
    spec = {
        "model": {"name": "InternVL2_5-1B", "source": SOURCE},
        "serving": {"servedModelNames": ["mine", "demo"]},
    }
    made = plan.make_plan(make_resource(spec), defaults=defaults)
    assert made.served_names == ("mine", "demo", "InternVL2_5-1B")


def test_images_stay_until_spec_or_annotation_changes(defaults, make_resource):
    recorded = {"tools": "t:0", "builder": "b:0", "runtime": "r:0"}
    status = {"resolved": {"imageRevision": "1/", "images": recorded}}

    def runtime(**options):
        return plan.choose_images(
            make_resource(status=status, **options), defaults=defaults
        ).runtime

    assert runtime() == "r:0"
    assert runtime(generation=2) == "runtime:1"
    assert runtime(annotations={"serving.internvl.dev/upgrade": "now"}) == "runtime:1"


def test_weights_of_another_model_than_named_are_refused():
    with pytest.raises(errors.SpecError, match="hidden_size is 896, but the source has 128"):
        plan.check_dimensions("InternVL2_5-1B", {"family": "qwen2", "hidden_size": 128})
