"""InternViT, pixel shuffle and projector.

Source: `modeling_intern_vit.py` and `modeling_internvl_chat.py` of
https://github.com/OpenGVLab/InternVL.
"""

import dataclasses

import torch
import torch.nn.functional as F  # noqa: N812

from internvl_runtime.engine import pixels
from internvl_runtime.engine.pytorch import weights as loading
from internvl_runtime.model import config

_PROJECTOR_EPS = 1e-5


@dataclasses.dataclass(frozen=True)
class VisionTower:
    """The vision tower with its projector."""

    vision: config.VisionConfig
    weights: loading.Weights

    def encode(self, tiles: torch.Tensor) -> torch.Tensor:
        """Return the features of uint8 tiles [N, 448, 448, 3]: [N, 256, hidden of the LLM]."""
        hidden = self._embed(pixels.normalize(tiles, dtype=self.weights["mlp1.0.weight"].dtype))
        encoder = self.weights.below("vision_model.encoder.layers")
        for layer in encoder.layers(self.vision.num_hidden_layers):
            hidden = hidden + self._attend(self._norm(hidden, layer, "norm1"), layer) * layer["ls1"]
            hidden = hidden + _mlp(self._norm(hidden, layer, "norm2"), layer) * layer["ls2"]
        return self._project(pixel_shuffle(hidden[:, 1:]))

    def _embed(self, tiles: torch.Tensor) -> torch.Tensor:
        embeddings = self.weights.below("vision_model.embeddings")
        kernel, bias = embeddings["patch_embedding.weight"], embeddings["patch_embedding.bias"]
        patches = F.conv2d(tiles, kernel, bias, stride=config.PATCH_SIZE)
        patches = patches.flatten(2).transpose(1, 2)
        class_token = embeddings["class_embedding"].expand(len(tiles), 1, -1)
        return torch.cat([class_token, patches], dim=1) + embeddings["position_embedding"]

    def _norm(self, hidden: torch.Tensor, layer: loading.Weights, name: str) -> torch.Tensor:
        weight = layer[f"{name}.weight"]
        if self.vision.norm_type == "rms_norm":
            return rms_norm(hidden, weight, self.vision.layer_norm_eps)
        bias = layer[f"{name}.bias"]
        return F.layer_norm(hidden, weight.shape, weight, bias, self.vision.layer_norm_eps)

    def _attend(self, hidden: torch.Tensor, layer: loading.Weights) -> torch.Tensor:
        qkv = F.linear(hidden, layer["attn.qkv.weight"], layer.get("attn.qkv.bias"))
        query, key, value = qkv.chunk(3, dim=-1)
        if self.vision.qk_normalization:
            query = rms_norm(query, layer["attn.q_norm.weight"], self.vision.layer_norm_eps)
            key = rms_norm(key, layer["attn.k_norm.weight"], self.vision.layer_norm_eps)
        mixed = F.scaled_dot_product_attention(
            self._split_heads(query), self._split_heads(key), self._split_heads(value)
        )
        mixed = mixed.transpose(1, 2).flatten(2)
        return F.linear(mixed, layer["attn.proj.weight"], layer["attn.proj.bias"])

    def _split_heads(self, hidden: torch.Tensor) -> torch.Tensor:
        shape = (*hidden.shape[:-1], self.vision.num_attention_heads, self.vision.head_size)
        heads = hidden.view(shape)
        return heads.transpose(1, 2)

    def _project(self, tokens: torch.Tensor) -> torch.Tensor:
        mlp = self.weights.below("mlp1")
        norm = mlp["0.weight"]
        tokens = F.layer_norm(tokens, norm.shape, norm, mlp["0.bias"], _PROJECTOR_EPS)
        tokens = F.gelu(F.linear(tokens, mlp["1.weight"], mlp["1.bias"]))
        return F.linear(tokens, mlp["3.weight"], mlp["3.bias"])


def pixel_shuffle(hidden: torch.Tensor) -> torch.Tensor:
    """Merge 2 x 2 patches into one token: [N, 1024, h] to [N, 256, 4h] (`ps_version` v2)."""
    half = config.TILE_SIZE // config.PATCH_SIZE // 2
    blocks = hidden.reshape(len(hidden), half, 2, half, 2, -1)
    return blocks.transpose(2, 3).flatten(3, 5).flatten(1, 2)


def rms_norm(hidden: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Normalize in float32, round, then scale: the order of the reference."""
    wide = hidden.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(hidden.dtype)


def _mlp(hidden: torch.Tensor, layer: loading.Weights) -> torch.Tensor:
    inner = F.gelu(F.linear(hidden, layer["mlp.fc1.weight"], layer["mlp.fc1.bias"]))
    return F.linear(inner, layer["mlp.fc2.weight"], layer["mlp.fc2.bias"])
