"""What TensorRT-LLM 1.2.1's loader wants of a rank checkpoint.

Written from the published sources (`tensorrt_llm/models/modeling_utils.py`,
`models/qwen`, `models/llama`), not from our converter.
"""

import json
import struct
from collections.abc import Iterable
from pathlib import Path

PRETRAINED_KEYS = {
    "architecture", "dtype", "logits_dtype", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_size", "hidden_size", "intermediate_size", "norm_epsilon",
    "vocab_size", "position_embedding_type", "rotary_base", "rotary_scaling",
    "max_position_embeddings", "hidden_act", "use_parallel_embedding", "embedding_sharding_dim",
    "quantization", "mapping",
}  # fmt: skip
QWEN_KEYS = PRETRAINED_KEYS | {"qwen_type", "attn_bias", "mlp_bias", "tie_word_embeddings"}
LLAMA_KEYS = PRETRAINED_KEYS | {"attn_bias", "mlp_bias", "has_partial_lora_mask"}
MAPPING_KEYS = {"world_size", "tp_size", "pp_size", "cp_size", "gpus_per_node"}
QUANTIZATION_KEYS = {"quant_algo", "kv_cache_quant_algo", "group_size", "exclude_modules"}
CLASSES = {"Qwen2ForCausalLM": QWEN_KEYS, "InternLM2ForCausalLM": LLAMA_KEYS}
FP8_ARCHITECTURES = {"InternLM2ForCausalLM"}
"""Those of `LLaMAForCausalLM`, whose converter has `--use_fp8_rowwise`."""
DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}


class CheckpointError(Exception):
    """Raised with the words of the loader."""


def read_config(folder: Path) -> dict:
    """Read config.json as `PretrainedConfig.from_dict` does."""
    raw = json.loads((folder / "config.json").read_text())
    architecture = raw["architecture"]
    if raw["quantization"]["quant_algo"] not in {None, FP8}:
        raise CheckpointError(f"quant_algo {raw['quantization']['quant_algo']}: strict double")
    if raw["quantization"]["quant_algo"] == FP8 and architecture not in FP8_ARCHITECTURES:
        raise CheckpointError(f"{architecture} with {FP8}: no published source shows it")
    if architecture not in CLASSES:
        raise CheckpointError(f"Unsupported model architecture: {architecture}")
    if raw["dtype"] not in DTYPES:
        raise CheckpointError(f"Invalid dtype: {raw['dtype']}")
    for keys, known, owner in (
        (raw.keys(), CLASSES[architecture], None),
        (raw["mapping"].keys(), MAPPING_KEYS, "Mapping"),
        (raw["quantization"].keys(), QUANTIZATION_KEYS, "QuantConfig"),
    ):
        for key in keys - known:
            if owner:
                raise TypeError(f"{owner}.__init__() got an unexpected keyword argument '{key}'")
            raise CheckpointError(f"Implicitly setting PretrainedConfig.{key}: strict double")
    scaling = raw["rotary_scaling"]
    if scaling and scaling.get("type") == "dynamic":
        scaling["alpha"]  # The position table reads it.
    mapping = raw["mapping"]
    if mapping["world_size"] != mapping["tp_size"] * mapping["pp_size"]:
        raise CheckpointError("world_size must equal to tp_size * pp_size * cp_size")
    return raw


def expected_tensors(config: dict) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of one rank's tensors."""
    ranks = config["mapping"]["tp_size"]
    hidden, inner, size = config["hidden_size"], config["intermediate_size"], config["head_size"]
    heads, shared = config["num_attention_heads"], config["num_key_value_heads"]
    if heads % ranks or inner % ranks:
        raise CheckpointError(f"{heads} heads or {inner} columns can not be split {ranks} ways")
    own = heads // ranks * size
    rows = own + 2 * ((shared + ranks - 1) // ranks) * size
    tensors = {
        "transformer.vocab_embedding.weight": (config["vocab_size"], hidden),
        "transformer.ln_f.weight": (hidden,),
        # Padded to a multiple of the ranks, then split.
        "lm_head.weight": ((config["vocab_size"] + ranks - 1) // ranks, hidden),
    }
    for layer in range(config["num_hidden_layers"]):
        root = f"transformer.layers.{layer}"
        tensors |= {
            f"{root}.input_layernorm.weight": (hidden,),
            f"{root}.attention.qkv.weight": (rows, hidden),
            f"{root}.attention.dense.weight": (hidden, own),
            f"{root}.post_layernorm.weight": (hidden,),
            f"{root}.mlp.fc.weight": (inner // ranks, hidden),
            f"{root}.mlp.gate.weight": (inner // ranks, hidden),
            f"{root}.mlp.proj.weight": (hidden, inner // ranks),
        }
        if config["architecture"] == "Qwen2ForCausalLM":
            tensors[f"{root}.attention.qkv.bias"] = (rows,)
        if config["quantization"]["quant_algo"] == FP8:
            for layer_name in QUANTIZED:
                rows_of = tensors[f"{root}.{layer_name}.weight"][:1]
                tensors[f"{root}.{layer_name}.per_channel_scale"] = rows_of
    return tensors


FP8 = "FP8_PER_CHANNEL_PER_TOKEN"
QUANTIZED = ("attention.qkv", "attention.dense", "mlp.fc", "mlp.gate", "mlp.proj")
"""Layers that `fp8_rowwise_quantize` replaces; it leaves out ln_f and lm_head."""


def expected_dtypes(config: dict, names: Iterable[str]) -> dict[str, str]:
    """Return the safetensors dtype of each tensor."""
    is_fp8 = config["quantization"]["quant_algo"] == FP8
    found = {}
    for name in names:
        is_quantized = is_fp8 and name.endswith(tuple(f"{q}.weight" for q in QUANTIZED))
        is_scale = name.endswith("per_channel_scale")
        found[name] = "F8_E4M3" if is_quantized else "F32" if is_scale else DTYPES[config["dtype"]]
    return found


def check_rank(config: dict, path: Path) -> list[str]:
    """Check a rank's file as `PretrainedModel.load` does; return its warnings."""
    if not path.exists():
        raise FileNotFoundError(f"No such file or directory: {path}")
    header = _read_header(path)
    expected = expected_tensors(config)
    dtypes = expected_dtypes(config, expected)
    missing = expected.keys() - header.keys()
    if missing:
        raise CheckpointError(f"Required but not provided tensors:{sorted(missing)}")
    for name, shape in expected.items():
        found = header[name]
        if tuple(found["shape"]) != shape:
            raise CheckpointError(
                f"Encountered error when trying to load {name}: shape {found['shape']}, "
                f"expected {list(shape)}"
            )
        if found["dtype"] != dtypes[name]:
            raise CheckpointError(f"{name} has dtype {found['dtype']}")
    extra = sorted(header.keys() - expected.keys())
    return [f"Provided but not expected tensors: {extra}"] if extra else []


def _read_header(path: Path) -> dict:
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    end = max(entry["data_offsets"][1] for entry in header.values())
    if path.stat().st_size != 8 + length + end:
        raise CheckpointError(
            f"safetensors: {path.name}: incomplete metadata, file not fully covered"
        )
    return header
