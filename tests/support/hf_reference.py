"""transformers' own InternVL on the weights of a published-style checkpoint.

Names and configuration follow the published conversions
(`InternVLForConditionalGeneration`); nothing of our engine is used.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import transformers

_VISION_LAYER = {
    "ls1": "lambda_1",
    "ls2": "lambda_2",
    "attn.q_norm.weight": "attention.q_norm.weight",
    "attn.k_norm.weight": "attention.k_norm.weight",
    "attn.proj.weight": "attention.projection_layer.weight",
    "attn.proj.bias": "attention.projection_layer.bias",
    "norm1.weight": "layernorm_before.weight",
    "norm1.bias": "layernorm_before.bias",
    "norm2.weight": "layernorm_after.weight",
    "norm2.bias": "layernorm_after.bias",
    "mlp.fc1.weight": "mlp.fc1.weight",
    "mlp.fc1.bias": "mlp.fc1.bias",
    "mlp.fc2.weight": "mlp.fc2.weight",
    "mlp.fc2.bias": "mlp.fc2.bias",
}
_EMBEDDINGS = {
    "class_embedding": "cls_token",
    "position_embedding": "position_embeddings",
    "patch_embedding.weight": "patch_embeddings.projection.weight",
    "patch_embedding.bias": "patch_embeddings.projection.bias",
}
_PROJECTOR = {"0": "layer_norm", "1": "linear_1", "3": "linear_2"}
_INTERNLM2 = {
    "attention.wo.weight": "self_attn.o_proj.weight",
    "feed_forward.w1.weight": "mlp.gate_proj.weight",
    "feed_forward.w3.weight": "mlp.up_proj.weight",
    "feed_forward.w2.weight": "mlp.down_proj.weight",
    "attention_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
}


def load_reference(folder: Path, *, image_token_id: int) -> Any:
    """Return the reference model in float32."""
    raw = json.loads((folder / "config.json").read_text())
    model = transformers.InternVLForConditionalGeneration(_config(raw, image_token_id))
    tensors: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        for name, tensor in safetensors.torch.load_file(path).items():
            tensors |= _rename(name, tensor.float(), raw)
    model.load_state_dict(tensors, strict=True)
    return model.eval()


def generate_greedily(
    model: Any, token_ids: list[int], tiles: np.ndarray | None, *, max_tokens: int
) -> tuple[list[int], np.ndarray]:
    """Return greedy tokens and their float32 logits [tokens, vocabulary].

    For a prompt and the uint8 tiles of all its pictures.
    """
    inputs = _inputs(token_ids, tiles)
    with torch.inference_mode():
        generated = model.generate(
            **inputs,
            attention_mask=torch.ones_like(inputs["input_ids"]),
            max_new_tokens=max_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
    logits = torch.cat(generated.logits).numpy()
    return generated.sequences[0, len(token_ids) :].tolist(), logits


def _inputs(token_ids: list[int], tiles: np.ndarray | None) -> dict[str, Any]:
    inputs: dict[str, Any] = {"input_ids": torch.tensor([token_ids])}
    if tiles is not None:
        pixels = torch.from_numpy(tiles).permute(0, 3, 1, 2).float() / 255
        mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
        std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
        inputs["pixel_values"] = (pixels - mean) / std
    return inputs


def _config(raw: dict[str, Any], image_token_id: int) -> Any:
    vision, text = raw["vision_config"], raw["llm_config"]
    common = {
        key: text[key]
        for key in (
            "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
            "intermediate_size", "vocab_size", "rms_norm_eps", "max_position_embeddings",
        )
    }  # fmt: skip
    is_qwen = text["architectures"] == ["Qwen2ForCausalLM"]
    text_class = transformers.Qwen2Config if is_qwen else transformers.LlamaConfig
    more = {} if is_qwen else {"attention_bias": False}
    rope = {"rope_type": "default", "rope_theta": text["rope_theta"]}
    vision_config = transformers.InternVLVisionConfig(
        hidden_size=vision["hidden_size"],
        num_hidden_layers=vision["num_hidden_layers"],
        num_attention_heads=vision["num_attention_heads"],
        intermediate_size=vision["intermediate_size"],
        norm_type=vision["norm_type"],
        layer_norm_eps=vision["layer_norm_eps"],
        use_qk_norm=vision["qk_normalization"],
        attention_bias=vision["qkv_bias"],
        image_size=[448, 448],
        patch_size=[14, 14],
        use_absolute_position_embeddings=True,
        use_mean_pooling=True,
    )
    return transformers.InternVLConfig(
        vision_config=vision_config,
        text_config=text_class(**common, rope_parameters=rope, tie_word_embeddings=False, **more),
        image_token_id=image_token_id,
        image_seq_length=256,
        downsample_ratio=0.5,
        projector_hidden_act="gelu",
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )


def _rename(name: str, tensor: torch.Tensor, raw: dict[str, Any]) -> dict[str, torch.Tensor]:
    part, _, rest = name.partition(".")
    if part == "mlp1":
        number, _, kind = rest.partition(".")
        return {f"model.multi_modal_projector.{_PROJECTOR[number]}.{kind}": tensor}
    if part == "vision_model":
        return _rename_vision(rest, tensor)
    return _rename_language(rest, tensor, raw["llm_config"])


def _rename_vision(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    root = "model.vision_tower"
    if name.startswith("embeddings."):
        return {f"{root}.embeddings.{_EMBEDDINGS[name.removeprefix('embeddings.')]}": tensor}
    _, _, layer, rest = name.split(".", 3)
    target = f"{root}.encoder.layer.{layer}"
    if rest.startswith("attn.qkv."):
        kind = rest.rpartition(".")[2]
        parts = zip("qkv", tensor.chunk(3), strict=True)
        return {f"{target}.attention.{x}_proj.{kind}": part for x, part in parts}
    return {f"{target}.{_VISION_LAYER[rest]}": tensor}


def _rename_language(
    name: str, tensor: torch.Tensor, text: dict[str, Any]
) -> dict[str, torch.Tensor]:
    root = "model.language_model"
    if name in {"lm_head.weight", "output.weight"}:
        return {"lm_head.weight": tensor}
    name = name.removeprefix("model.")
    if name == "tok_embeddings.weight":
        return {f"{root}.embed_tokens.weight": tensor}
    if not name.startswith("layers.") or text["architectures"] == ["Qwen2ForCausalLM"]:
        return {f"{root}.{name}": tensor}
    _, layer, rest = name.split(".", 2)
    target = f"{root}.layers.{layer}"
    if rest == "attention.wqkv.weight":
        return {
            f"{target}.self_attn.{x}_proj.weight": part
            for x, part in zip("qkv", _split_wqkv(tensor, text), strict=True)
        }
    return {f"{target}.{_INTERNLM2[rest]}": tensor}


def _split_wqkv(
    tensor: torch.Tensor, text: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    heads, shared = text["num_attention_heads"], text["num_key_value_heads"]
    size, hidden = text["hidden_size"] // heads, text["hidden_size"]
    grouped = tensor.view(shared, heads // shared + 2, size, hidden)
    return (
        grouped[:, :-2].reshape(-1, hidden),
        grouped[:, -2].reshape(-1, hidden),
        grouped[:, -1].reshape(-1, hidden),
    )
