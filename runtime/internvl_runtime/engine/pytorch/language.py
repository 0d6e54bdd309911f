"""The language model of both families, with a key/value cache.

Qwen2 and InternLM2 differ in the biases of q, k and v alone once their weights
are in TensorRT-LLM's layout. Both rotate halves (NeoX) and normalize in
float32.
"""

import dataclasses

import torch
import torch.nn.functional as F  # noqa: N812

from internvl_runtime.engine.pytorch import vision
from internvl_runtime.engine.pytorch import weights as loading
from internvl_runtime.model import config


class KeyValueCache:
    """Keys and values of one sequence: for each layer [2, heads, capacity, head size]."""

    def __init__(
        self, language: config.LanguageConfig, *, capacity: int, dtype: torch.dtype
    ) -> None:
        shape = (2, language.num_key_value_heads, capacity, language.head_size)
        layers = range(language.num_hidden_layers)
        self._layers = [torch.empty(shape, dtype=dtype) for _ in layers]
        self.length = 0

    def append(
        self, layer: int, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write [heads, tokens, head size] behind `length`; returns all keys and values."""
        end = self.length + key.shape[1]
        store = self._layers[layer]
        store[0, :, self.length : end] = key
        store[1, :, self.length : end] = value
        return store[0, :, :end], store[1, :, :end]


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """The decoder."""

    language: config.LanguageConfig
    weights: loading.Weights

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of weights and activations."""
        return self.weights["transformer.ln_f.weight"].dtype

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Return the embeddings of token ids [T]: [T, hidden]."""
        return F.embedding(token_ids, self.weights["transformer.vocab_embedding.weight"])

    def forward(self, hidden: torch.Tensor, cache: KeyValueCache) -> torch.Tensor:
        """Run embeddings [T, hidden] behind what the cache holds; float32 logits of the last."""
        rotation = self._rotation(cache.length, len(hidden))
        mask = causal_mask(past=cache.length, new=len(hidden))
        eps = self.language.rms_norm_eps
        transformer = self.weights.below("transformer")
        layers = transformer.below("layers").layers(self.language.num_hidden_layers)
        for number, layer in enumerate(layers):
            normed = vision.rms_norm(hidden, layer["input_layernorm.weight"], eps)
            key_value = (cache, number)
            hidden = hidden + self._attend(normed, layer, key_value, rotation, mask)
            normed = vision.rms_norm(hidden, layer["post_layernorm.weight"], eps)
            hidden = hidden + _gated_mlp(normed, layer.below("mlp"))
        cache.length += len(hidden)
        last = vision.rms_norm(hidden[-1], transformer["ln_f.weight"], eps)
        return F.linear(last, self.weights["lm_head.weight"]).to(torch.float32)

    def _attend(
        self,
        hidden: torch.Tensor,
        layer: loading.Weights,
        key_value: tuple[KeyValueCache, int],
        rotation: tuple[torch.Tensor, torch.Tensor],
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        config_ = self.language
        heads, shared = config_.num_attention_heads, config_.num_key_value_heads
        qkv = F.linear(hidden, layer["attention.qkv.weight"], layer.get("attention.qkv.bias"))
        by_head = qkv.view(len(hidden), heads + 2 * shared, config_.head_size).transpose(0, 1)
        query, key, value = by_head.split([heads, shared, shared])
        cache, number = key_value
        keys, values = cache.append(number, rotate(key, rotation), value)
        mixed = F.scaled_dot_product_attention(
            rotate(query, rotation).unsqueeze(0),
            keys.unsqueeze(0),
            values.unsqueeze(0),
            attn_mask=mask,
            enable_gqa=True,
        )
        return F.linear(mixed[0].transpose(0, 1).flatten(1), layer["attention.dense.weight"])

    def _rotation(self, start: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        size = self.language.head_size
        exponents = torch.arange(0, size, 2, dtype=torch.int64).to(torch.float32) / size
        frequencies = 1.0 / (self.language.rope_theta**exponents)
        positions = torch.arange(start, start + count, dtype=torch.float32)
        angles = torch.outer(positions, frequencies).repeat(1, 2)
        return angles.cos().to(self.dtype), angles.sin().to(self.dtype)


def causal_mask(*, past: int, new: int) -> torch.Tensor | None:
    """Return which of past + new positions each new one sees: [new, past + new], None for all."""
    if new == 1:
        return None
    return torch.ones(new, past + new, dtype=torch.bool).tril(diagonal=past)


def rotate(heads: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Apply rotary embeddings to [heads, T, head size], rotating halves."""
    cosine, sine = rotation
    first, second = heads.chunk(2, dim=-1)
    return heads * cosine + torch.cat([-second, first], dim=-1) * sine


def _gated_mlp(hidden: torch.Tensor, mlp: loading.Weights) -> torch.Tensor:
    activated = F.silu(F.linear(hidden, mlp["fc.weight"]))
    return F.linear(activated * F.linear(hidden, mlp["gate.weight"]), mlp["proj.weight"])
