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

_ABSENT = object()
_MAX_DYNAMIC_PATCH = 6
"""What the authors' class takes where the field is absent; the published configs say 12."""


@dataclasses.dataclass(frozen=True)
class _Fixed:
    """The one value of a field that is known to give the right numbers."""

    value: object
    by_default: object = _ABSENT
    """What the authors' class takes where the field is absent."""


_FIXED_TOP_LEVEL = {
    "template": _Fixed("internvl2_5"),
    "downsample_ratio": _Fixed(0.5, by_default=0.5),
    "ps_version": _Fixed("v2", by_default="v1"),
    "select_layer": _Fixed(-1, by_default=-1),
    "dynamic_image_size": _Fixed(True, by_default=False),
    "use_thumbnail": _Fixed(True, by_default=False),
    "min_dynamic_patch": _Fixed(1, by_default=1),
    "force_image_size": _Fixed(TILE_SIZE),
    "pad2square": _Fixed(False, by_default=False),
    "use_backbone_lora": _Fixed(0, by_default=0),
    "use_llm_lora": _Fixed(0, by_default=0),
    "tie_word_embeddings": _Fixed(False, by_default=False),
    "quantization_config": _Fixed(None, by_default=None),
}
_FIXED_VISION = {
    "image_size": _Fixed(TILE_SIZE),
    "patch_size": _Fixed(PATCH_SIZE),
    "num_channels": _Fixed(3, by_default=3),
    "hidden_act": _Fixed("gelu", by_default="gelu"),
}
_FIXED_LANGUAGE = {
    "hidden_act": _Fixed("silu", by_default="silu"),
    "tie_word_embeddings": _Fixed(False, by_default=False),
    "max_position_embeddings": _Fixed(MAX_CONTEXT),
    "use_sliding_window": _Fixed(False, by_default=False),
    "quantization_config": _Fixed(None, by_default=None),
}
_INTERNLM2_BIAS = _Fixed(False, by_default=True)


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
    max_dynamic_patch: int = 12
    """Most tiles of a picture's grid, the thumbnail not counted, where nothing else is said."""

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
    _check_fixed(raw, _FIXED_TOP_LEVEL, where="")
    return ModelConfig(
        language=_parse_language(_section(raw, "llm_config")),
        vision=_parse_vision(_section(raw, "vision_config")),
        system_message=_system_message(raw),
        max_dynamic_patch=_integer(
            {"max_dynamic_patch": _MAX_DYNAMIC_PATCH, **raw}, "max_dynamic_patch"
        ),
    )


def _system_message(raw: Mapping[str, Any]) -> str | None:
    message = raw.get("system_message")
    if message is not None and not isinstance(message, str):
        raise _unsupported("system_message", "a text or null", message)
    return message


def _parse_language(raw: Mapping[str, Any]) -> LanguageConfig:
    architectures = raw.get("architectures")
    architecture = architectures[0] if isinstance(architectures, list) and architectures else None
    if not isinstance(architecture, str) or architecture not in _ARCHITECTURES:
        raise _unsupported("llm_config.architectures", " or ".join(_ARCHITECTURES), architecture)
    family = _ARCHITECTURES[architecture]
    fixed = _FIXED_LANGUAGE | ({"bias": _INTERNLM2_BIAS} if family is Family.INTERNLM2 else {})
    _check_fixed(raw, fixed, where="llm_config.")
    _check_rope_scaling(raw)
    language = LanguageConfig(
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
    _check_heads(raw, language, where="llm_config.")
    if language.num_attention_heads % language.num_key_value_heads:
        raise _unsupported(
            "llm_config.num_key_value_heads",
            f"a divisor of num_attention_heads {language.num_attention_heads}",
            language.num_key_value_heads,
        )
    return language


def _parse_vision(raw: Mapping[str, Any]) -> VisionConfig:
    _check_fixed(raw, _FIXED_VISION, where="vision_config.")
    norm_type = raw.get("norm_type")
    if norm_type not in ("layer_norm", "rms_norm"):
        raise _unsupported("vision_config.norm_type", "layer_norm or rms_norm", norm_type)
    vision = VisionConfig(
        hidden_size=_integer(raw, "hidden_size"),
        num_hidden_layers=_integer(raw, "num_hidden_layers"),
        num_attention_heads=_integer(raw, "num_attention_heads"),
        intermediate_size=_integer(raw, "intermediate_size"),
        norm_type=str(norm_type),
        layer_norm_eps=_number(raw, "layer_norm_eps"),
        qk_normalization=_boolean(raw, "qk_normalization"),
        qkv_bias=_boolean(raw, "qkv_bias"),
    )
    _check_heads(raw, vision, where="vision_config.")
    return vision


def _check_rope_scaling(raw: Mapping[str, Any]) -> None:
    """Accept what is the identity up to 32,768 positions: nothing, or dynamic NTK.

    transformers 5 writes the same under `rope_parameters`.
    """
    for key in ("rope_scaling", "rope_parameters"):
        scaling = raw.get(key)
        if scaling is None:
            continue
        kind = (
            scaling.get("type", scaling.get("rope_type"))
            if isinstance(scaling, Mapping)
            else scaling
        )
        if kind not in ("dynamic", "default"):
            raise _unsupported(f"llm_config.{key}.type", "dynamic or no scaling", kind)


def _check_heads(
    raw: Mapping[str, Any], part: LanguageConfig | VisionConfig, *, where: str
) -> None:
    """Check that the heads share the hidden size evenly, and that no other width is asked for."""
    if part.hidden_size % part.num_attention_heads:
        raise _unsupported(
            f"{where}num_attention_heads",
            f"a divisor of hidden_size {part.hidden_size}",
            part.num_attention_heads,
        )
    _check_fixed(raw, {"head_dim": _Fixed(part.head_size, part.head_size)}, where=where)


def _section(raw: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    section = raw.get(key)
    if not isinstance(section, Mapping):
        raise _unsupported(key, "an object", type(section).__name__)
    return section


def _integer(raw: Mapping[str, Any], key: str) -> int:
    value = raw.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
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


def _check_fixed(raw: Mapping[str, Any], fields: Mapping[str, _Fixed], *, where: str) -> None:
    for key, fixed in fields.items():
        found = raw.get(key, fixed.by_default)
        if found is _ABSENT:
            raise _unsupported(where + key, fixed.value, "absent")
        if found != fixed.value:
            raise _unsupported(where + key, fixed.value, found)


def _unsupported(field: str, expected: object, found: object) -> errors.StageError:
    return errors.StageError(
        errors.Reason.UNSUPPORTED_MODEL,
        f"config.json: {field} is {found!r}, expected {expected!r}",
        remedy="use one of the InternVL2_5 models (1B to 78B, also -MPO) or a fine-tune of one",
    )
