"""The dimensions of the published models, and of small ones for tests.

Source: the `config.json` files of the OpenGVLab/InternVL2_5-* repositories.
"""

import dataclasses

from internvl_runtime.model import config

QWEN_VOCAB_SIZE = 151674
INTERNLM2_VOCAB_SIZE = 92553
TINY = "tiny"
TINY_6B_VISION = "tiny-6b-vision"

_INTERNVIT_300M = config.VisionConfig(
    hidden_size=1024,
    num_hidden_layers=24,
    num_attention_heads=16,
    intermediate_size=4096,
    norm_type="layer_norm",
    layer_norm_eps=1e-6,
    qk_normalization=False,
    qkv_bias=True,
)
_INTERNVIT_6B = config.VisionConfig(
    hidden_size=3200,
    num_hidden_layers=45,
    num_attention_heads=25,
    intermediate_size=12800,
    norm_type="rms_norm",
    layer_norm_eps=1e-6,
    qk_normalization=True,
    qkv_bias=False,
)
_TINY_VISION = dataclasses.replace(
    _INTERNVIT_300M,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=128,
)
_TINY_6B_VISION = dataclasses.replace(
    _INTERNVIT_6B,
    hidden_size=80,
    num_hidden_layers=3,
    num_attention_heads=5,
    intermediate_size=160,
)


def _language(
    family: config.Family, *, hidden: int, layers: int, heads: int, kv_heads: int, intermediate: int
) -> config.LanguageConfig:
    is_qwen = family is config.Family.QWEN2
    return config.LanguageConfig(
        family=family,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=intermediate,
        vocab_size=QWEN_VOCAB_SIZE if is_qwen else INTERNLM2_VOCAB_SIZE,
        rope_theta=1e6,
        rms_norm_eps=1e-6 if is_qwen else 1e-5,
        max_position_embeddings=config.MAX_CONTEXT,
    )


def _model(language: config.LanguageConfig, vision: config.VisionConfig) -> config.ModelConfig:
    return config.ModelConfig(language=language, vision=vision, system_message=None)


_QWEN2, _INTERNLM2 = config.Family.QWEN2, config.Family.INTERNLM2

PUBLISHED = {
    "InternVL2_5-1B": _model(
        _language(_QWEN2, hidden=896, layers=24, heads=14, kv_heads=2, intermediate=4864),
        _INTERNVIT_300M,
    ),
    "InternVL2_5-2B": _model(
        _language(_INTERNLM2, hidden=2048, layers=24, heads=16, kv_heads=8, intermediate=8192),
        _INTERNVIT_300M,
    ),
    "InternVL2_5-4B": _model(
        _language(_QWEN2, hidden=2048, layers=36, heads=16, kv_heads=2, intermediate=11008),
        _INTERNVIT_300M,
    ),
    "InternVL2_5-8B": _model(
        _language(_INTERNLM2, hidden=4096, layers=32, heads=32, kv_heads=8, intermediate=14336),
        _INTERNVIT_300M,
    ),
    "InternVL2_5-26B": _model(
        _language(_INTERNLM2, hidden=6144, layers=48, heads=48, kv_heads=8, intermediate=16384),
        _INTERNVIT_6B,
    ),
    "InternVL2_5-38B": _model(
        _language(_QWEN2, hidden=5120, layers=64, heads=40, kv_heads=8, intermediate=27648),
        _INTERNVIT_6B,
    ),
    "InternVL2_5-78B": _model(
        _language(_QWEN2, hidden=8192, layers=80, heads=64, kv_heads=8, intermediate=29568),
        _INTERNVIT_6B,
    ),
}


def tiny_model(shape: str, family: config.Family, *, vocab_size: int) -> config.ModelConfig:
    """Return a small model with every structural property of the published ones.

    8 query and 2 key/value heads, and an odd vocabulary: it runs at tensor
    parallel sizes 1, 2, 4 and 8, by duplicated heads and padded vocabulary.
    """
    language = dataclasses.replace(
        _language(family, hidden=128, layers=2, heads=8, kv_heads=2, intermediate=256),
        vocab_size=vocab_size,
    )
    return _model(language, _TINY_VISION if shape == TINY else _TINY_6B_VISION)
