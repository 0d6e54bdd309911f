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
    ("use_thumbnail", False, "use_thumbnail is False"),
    ("min_dynamic_patch", 2, "min_dynamic_patch is 2"),
    ("use_llm_lora", 16, "use_llm_lora is 16"),
    ("tie_word_embeddings", True, "tie_word_embeddings is True"),
    ("quantization_config", {"bits": 4}, "quantization_config"),
    ("system_message", 7, "system_message"),
    ("llm_config.use_sliding_window", True, "use_sliding_window is True"),
    ("llm_config.head_dim", 128, "llm_config.head_dim is 128, expected 64"),
    ("llm_config.num_attention_heads", 15, "llm_config.num_attention_heads is 15"),
    ("llm_config.num_key_value_heads", 3, "llm_config.num_key_value_heads is 3"),
    ("llm_config.max_position_embeddings", 65536, "max_position_embeddings is 65536"),
    ("llm_config.hidden_size", True, "hidden_size is True"),
    ("vision_config.num_channels", 4, "vision_config.num_channels is 4"),
    ("vision_config.num_attention_heads", 15, "vision_config.num_attention_heads is 15"),
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


# What the authors' classes take where a field is absent, so that it may be.
ABSENT = [
    "downsample_ratio", "select_layer", "pad2square", "min_dynamic_patch", "use_backbone_lora",
    "llm_config.hidden_act", "llm_config.tie_word_embeddings", "llm_config.rope_scaling",
    "vision_config.hidden_act",
]  # fmt: skip
NEEDED = ["template", "ps_version", "dynamic_image_size", "use_thumbnail", "force_image_size",
          "llm_config.max_position_embeddings", "vision_config.image_size"]  # fmt: skip


def config_without(field, name="InternVL2_5-1B"):
    raw = copy.deepcopy(synthesize.describe_config(shapes.PUBLISHED[name]))
    *path, last = field.split(".")
    (raw[path[0]] if path else raw).pop(last, None)
    return raw


@pytest.mark.parametrize("field", ABSENT)
def test_an_absent_field_is_the_authors_default(field):
    assert config.parse_model_config(config_without(field)) == shapes.PUBLISHED["InternVL2_5-1B"]


@pytest.mark.parametrize("field", NEEDED)
def test_a_field_whose_default_is_another_model_must_be_there(field):
    with pytest.raises(errors.StageError, match=field):
        config.parse_model_config(config_without(field))


def test_an_absent_tile_limit_is_that_of_the_authors_class():
    assert config.parse_model_config(config_without("max_dynamic_patch")).max_dynamic_patch == 6


def test_internlm2_without_a_word_on_biases_has_them_and_is_refused():
    with pytest.raises(errors.StageError, match=r"llm_config\.bias is True"):
        config.parse_model_config(config_without("llm_config.bias", "InternVL2_5-2B"))


def test_a_null_system_message_counts_as_absent():
    raw = synthesize.describe_config(shapes.PUBLISHED["InternVL2_5-1B"]) | {"system_message": None}
    assert config.parse_model_config(raw).system_message is None


def test_a_folder_without_config_is_no_model(tmp_path):
    with pytest.raises(errors.StageError, match=r"no config\.json"):
        config.read_model_config(tmp_path)
