import copy

import pytest
from internvl_runtime import errors
from internvl_runtime.artifacts import shapes, synthesize
from internvl_runtime.model import config


@pytest.mark.parametrize("name", shapes.PUBLISHED)
def test_a_published_config_is_read_as_it_was_described(name):
    model = shapes.PUBLISHED[name]
    assert config.parse_model_config(synthesize.describe_config(model)) == model


PARAMETERS = {
    "InternVL2_5-1B": 938_193_024,
    "InternVL2_5-2B": 2_205_754_368,
    "InternVL2_5-4B": 3_712_637_952,
    "InternVL2_5-8B": 8_075_365_376,
    "InternVL2_5-26B": 25_514_186_112,
    "InternVL2_5-38B": 38_388_164_992,
    "InternVL2_5-78B": 78_408_318_336,
}


@pytest.mark.parametrize(("name", "expected"), PARAMETERS.items())
def test_the_tensors_of_a_published_model_have_the_published_total(name, expected):
    shards = synthesize.plan_shards(shapes.PUBLISHED[name])
    assert sum(tensor.bytes for shard in shards for tensor in shard.tensors) == 2 * expected


SURPRISES = [
    ("model_type", "llava", "model_type is 'llava'"),
    ("template", "internvl3", "template is 'internvl3'"),
    ("ps_version", "v1", "ps_version"),
    ("select_layer", -2, "select_layer"),
    ("llm_config.tie_word_embeddings", True, "llm_config.tie_word_embeddings is True"),
    ("llm_config.architectures", ["LlamaForCausalLM"], "LlamaForCausalLM"),
    ("llm_config.rope_scaling", {"type": "linear", "factor": 2}, "rope_scaling.type is 'linear'"),
    ("llm_config.hidden_size", 0, "hidden_size"),
    ("llm_config", None, "llm_config"),
    ("llm_config.rope_theta", None, "rope_theta"),
    ("vision_config.qk_normalization", None, "qk_normalization"),
    ("vision_config.norm_type", "batch_norm", "vision_config.norm_type"),
    ("vision_config.image_size", 224, "vision_config.image_size is 224"),
]


@pytest.mark.parametrize(("field", "value", "words"), SURPRISES, ids=[s[0] for s in SURPRISES])
def test_a_surprise_is_refused_by_its_name(field, value, words):
    raw = copy.deepcopy(synthesize.describe_config(shapes.PUBLISHED["InternVL2_5-1B"]))
    *path, last = field.split(".")
    target = raw[path[0]] if path else raw
    target[last] = value

    with pytest.raises(errors.StageError, match=words) as caught:
        config.parse_model_config(raw)

    assert caught.value.reason is errors.Reason.UNSUPPORTED_MODEL


def test_a_null_system_message_counts_as_absent():
    raw = synthesize.describe_config(shapes.PUBLISHED["InternVL2_5-1B"]) | {"system_message": None}
    assert config.parse_model_config(raw).system_message is None


def test_a_folder_without_config_is_no_model(tmp_path):
    with pytest.raises(errors.StageError, match=r"no config\.json"):
        config.read_model_config(tmp_path)
