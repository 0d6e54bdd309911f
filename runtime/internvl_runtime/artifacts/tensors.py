"""Names and shapes of a published checkpoint's tensors; Linear weights are (out, in)."""

from collections.abc import Iterator

from internvl_runtime.model import config

Shapes = Iterator[tuple[str, tuple[int, ...]]]


def list_tensors(model: config.ModelConfig) -> Shapes:
    """Yield name and shape of every tensor of a published checkpoint."""
    yield from _vision_tensors(model.vision)
    yield from _projector_tensors(model)
    if model.language.family is config.Family.QWEN2:
        yield from _qwen_tensors(model.language)
    else:
        yield from _internlm2_tensors(model.language)


def _vision_tensors(vision: config.VisionConfig) -> Shapes:
    hidden, inner = vision.hidden_size, vision.intermediate_size
    positions = (config.TILE_SIZE // config.PATCH_SIZE) ** 2 + 1
    root = "vision_model.embeddings"
    yield f"{root}.class_embedding", (1, 1, hidden)
    yield f"{root}.position_embedding", (1, positions, hidden)
    yield f"{root}.patch_embedding.weight", (hidden, 3, config.PATCH_SIZE, config.PATCH_SIZE)
    yield f"{root}.patch_embedding.bias", (hidden,)
    for layer in range(vision.num_hidden_layers):
        root = f"vision_model.encoder.layers.{layer}"
        yield f"{root}.ls1", (hidden,)
        yield f"{root}.ls2", (hidden,)
        yield f"{root}.attn.qkv.weight", (3 * hidden, hidden)
        if vision.qkv_bias:
            yield f"{root}.attn.qkv.bias", (3 * hidden,)
        if vision.qk_normalization:
            yield f"{root}.attn.q_norm.weight", (hidden,)
            yield f"{root}.attn.k_norm.weight", (hidden,)
        yield from _linear(f"{root}.attn.proj", hidden, hidden)
        yield from _linear(f"{root}.mlp.fc1", inner, hidden)
        yield from _linear(f"{root}.mlp.fc2", hidden, inner)
        for norm in ("norm1", "norm2"):
            yield f"{root}.{norm}.weight", (hidden,)
            if vision.norm_type == "layer_norm":
                yield f"{root}.{norm}.bias", (hidden,)


def _projector_tensors(model: config.ModelConfig) -> Shapes:
    wide, hidden = model.projector_input_size, model.language.hidden_size
    yield "mlp1.0.weight", (wide,)
    yield "mlp1.0.bias", (wide,)
    yield from _linear("mlp1.1", hidden, wide)
    yield from _linear("mlp1.3", hidden, hidden)


def _qwen_tensors(language: config.LanguageConfig) -> Shapes:
    hidden, inner = language.hidden_size, language.intermediate_size
    key_value = language.num_key_value_heads * language.head_size
    yield "language_model.model.embed_tokens.weight", (language.vocab_size, hidden)
    for layer in range(language.num_hidden_layers):
        root = f"language_model.model.layers.{layer}"
        yield from _linear(f"{root}.self_attn.q_proj", hidden, hidden)
        yield from _linear(f"{root}.self_attn.k_proj", key_value, hidden)
        yield from _linear(f"{root}.self_attn.v_proj", key_value, hidden)
        yield f"{root}.self_attn.o_proj.weight", (hidden, hidden)
        yield f"{root}.mlp.gate_proj.weight", (inner, hidden)
        yield f"{root}.mlp.up_proj.weight", (inner, hidden)
        yield f"{root}.mlp.down_proj.weight", (hidden, inner)
        yield f"{root}.input_layernorm.weight", (hidden,)
        yield f"{root}.post_attention_layernorm.weight", (hidden,)
    yield "language_model.model.norm.weight", (hidden,)
    yield "language_model.lm_head.weight", (language.vocab_size, hidden)


def _internlm2_tensors(language: config.LanguageConfig) -> Shapes:
    hidden, inner = language.hidden_size, language.intermediate_size
    key_value = language.num_key_value_heads * language.head_size
    yield "language_model.model.tok_embeddings.weight", (language.vocab_size, hidden)
    for layer in range(language.num_hidden_layers):
        root = f"language_model.model.layers.{layer}"
        yield f"{root}.attention.wqkv.weight", (hidden + 2 * key_value, hidden)
        yield f"{root}.attention.wo.weight", (hidden, hidden)
        yield f"{root}.feed_forward.w1.weight", (inner, hidden)
        yield f"{root}.feed_forward.w3.weight", (inner, hidden)
        yield f"{root}.feed_forward.w2.weight", (hidden, inner)
        yield f"{root}.attention_norm.weight", (hidden,)
        yield f"{root}.ffn_norm.weight", (hidden,)
    yield "language_model.model.norm.weight", (hidden,)
    yield "language_model.output.weight", (language.vocab_size, hidden)


def _linear(name: str, outputs: int, inputs: int) -> Shapes:
    yield f"{name}.weight", (outputs, inputs)
    yield f"{name}.bias", (outputs,)
