"""InternVL2.5 configurations, read from a checkpoint's own config.json.

Every value that changes the numbers is either taken over or, where only one
value is known to be right, checked: a surprise is refused by its name.
Source of the checked values: the published `config.json` files of the
OpenGVLab/InternVL2_5-* repositories and `InternVLChatConfig` of
https://github.com/OpenGVLab/InternVL.
"""

import dataclasses
import enum
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from internvl_runtime import errors

TILE_SIZE = 448
PATCH_SIZE = 14
TOKENS_PER_TILE = 256
MAX_CONTEXT = 32768

_FIXED_TOP_LEVEL = {
    "template": "internvl2_5",
    "downsample_ratio": 0.5,
    "ps_version": "v2",
    "select_layer": -1,
    "dynamic_image_size": True,
    "use_thumbnail": True,
    "force_image_size": TILE_SIZE,
    "pad2square": False,
}
_FIXED_VISION = {"image_size": TILE_SIZE, "patch_size": PATCH_SIZE, "hidden_act": "gelu"}
_FIXED_LANGUAGE = {
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "max_position_embeddings": MAX_CONTEXT,
}


class Family(enum.StrEnum):
    """The two families of language models."""

    QWEN2 = "qwen2"
    INTERNLM2 = "internlm2"


_ARCHITECTURES = {
    "Qwen2ForCausalLM": Family.QWEN2,
    "InternLM2ForCausalLM": Family.INTERNLM2,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageConfig:
    """Dimensions of the language model (`llm_config`)."""

    family: Family
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    vocab_size: int
    """Rows of the embedding, unpadded."""
    rope_theta: float
    rms_norm_eps: float
    max_position_embeddings: int

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def has_attention_bias(self) -> bool:
        """Whether q, k and v have a bias: the Qwen family's do."""
        return self.family is Family.QWEN2


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """Dimensions and variant of the vision tower (`vision_config`)."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    norm_type: str
    """`layer_norm` (the 300M tower) or `rms_norm` (the 6B tower)."""
    layer_norm_eps: float
    qk_normalization: bool
    qkv_bias: bool

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One InternVL2.5 model."""

    language: LanguageConfig
    vision: VisionConfig
    system_message: str | None
    """Overrides the template's system message; null in a config.json counts as absent."""

    @property
    def projector_input_size(self) -> int:
        """Channels of one image token after the pixel shuffle."""
        return self.vision.hidden_size * 4


def read_model_config(model_dir: Path) -> ModelConfig:
    """Read `config.json` of a checkpoint.

    Raises StageError when the file is missing, is no JSON or describes a model
    that is not InternVL2.5.
    """
    path = model_dir / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        raise errors.StageError(
            errors.Reason.MODEL_NOT_FOUND,
            f"there is no config.json in {model_dir}",
            remedy="point the source at the folder that holds config.json and *.safetensors",
        ) from e
    except (OSError, ValueError) as e:
        raise errors.StageError(
            errors.Reason.MODEL_NOT_FOUND,
            f"{path} can not be read as JSON: {e}",
            remedy="copy the model again, and make its files readable for everyone",
        ) from e
    return parse_model_config(raw)


def parse_model_config(raw: Any) -> ModelConfig:
    """Read the content of a `config.json`; raises StageError for anything but InternVL2.5."""
    if not isinstance(raw, Mapping) or raw.get("model_type") != "internvl_chat":
        found = raw.get("model_type") if isinstance(raw, Mapping) else type(raw).__name__
        raise _unsupported("model_type", "internvl_chat", found)
    for key, expected in _FIXED_TOP_LEVEL.items():
        _check(raw, key, expected, where="")
    return ModelConfig(
        language=_parse_language(_section(raw, "llm_config")),
        vision=_parse_vision(_section(raw, "vision_config")),
        system_message=raw.get("system_message"),
    )


def _parse_language(raw: Mapping[str, Any]) -> LanguageConfig:
    architecture = next(iter(raw.get("architectures") or ()), None)
    if architecture not in _ARCHITECTURES:
        raise _unsupported("llm_config.architectures", " or ".join(_ARCHITECTURES), architecture)
    family = _ARCHITECTURES[architecture]
    for key, expected in _FIXED_LANGUAGE.items():
        _check(raw, key, expected, where="llm_config.")
    if family is Family.INTERNLM2:
        _check(raw, "bias", False, where="llm_config.")
    _check_rope_scaling(raw.get("rope_scaling"))
    return LanguageConfig(
        family=family,
        hidden_size=_integer(raw, "hidden_size"),
        num_hidden_layers=_integer(raw, "num_hidden_layers"),
        num_attention_heads=_integer(raw, "num_attention_heads"),
        num_key_value_heads=_integer(raw, "num_key_value_heads"),
        intermediate_size=_integer(raw, "intermediate_size"),
        vocab_size=_integer(raw, "vocab_size"),
        rope_theta=_number(raw, "rope_theta"),
        rms_norm_eps=_number(raw, "rms_norm_eps"),
        max_position_embeddings=_integer(raw, "max_position_embeddings"),
    )


def _parse_vision(raw: Mapping[str, Any]) -> VisionConfig:
    for key, expected in _FIXED_VISION.items():
        _check(raw, key, expected, where="vision_config.")
    norm_type = raw.get("norm_type")
    if norm_type not in {"layer_norm", "rms_norm"}:
        raise _unsupported("vision_config.norm_type", "layer_norm or rms_norm", norm_type)
    return VisionConfig(
        hidden_size=_integer(raw, "hidden_size"),
        num_hidden_layers=_integer(raw, "num_hidden_layers"),
        num_attention_heads=_integer(raw, "num_attention_heads"),
        intermediate_size=_integer(raw, "intermediate_size"),
        norm_type=str(norm_type),
        layer_norm_eps=_number(raw, "layer_norm_eps"),
        qk_normalization=_boolean(raw, "qk_normalization"),
        qkv_bias=_boolean(raw, "qkv_bias"),
    )


def _check_rope_scaling(scaling: Any) -> None:
    """Accept what is the identity up to 32,768 positions: nothing, or dynamic NTK."""
    if scaling is None:
        return
    kind = (
        scaling.get("type", scaling.get("rope_type")) if isinstance(scaling, Mapping) else scaling
    )
    if kind != "dynamic":
        raise _unsupported("llm_config.rope_scaling.type", "dynamic or no scaling", kind)


def _section(raw: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    section = raw.get(key)
    if not isinstance(section, Mapping):
        raise _unsupported(key, "an object", type(section).__name__)
    return section


def _integer(raw: Mapping[str, Any], key: str) -> int:
    value = raw.get(key)
    if not isinstance(value, int) or value <= 0:
        raise _unsupported(key, "a positive integer", value)
    return value


def _number(raw: Mapping[str, Any], key: str) -> float:
    value = raw.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise _unsupported(key, "a positive number", value)
    return float(value)


def _boolean(raw: Mapping[str, Any], key: str) -> bool:
    value = raw.get(key)
    if not isinstance(value, bool):
        raise _unsupported(key, "true or false", value)
    return value


def _check(raw: Mapping[str, Any], key: str, expected: object, *, where: str) -> None:
    found = raw.get(key)
    if found != expected:
        raise _unsupported(where + key, expected, found)


def _unsupported(field: str, expected: object, found: object) -> errors.StageError:
    return errors.StageError(
        errors.Reason.UNSUPPORTED_MODEL,
        f"config.json: {field} is {found!r}, expected {expected!r}",
        remedy="use one of the InternVL2_5 models (1B to 78B, also -MPO) or a fine-tune of one",
    )
