"""The language model of both families, over tokens of many sequences at once.

Qwen2 and InternLM2 differ in the biases of q, k and v alone once their weights
are in TensorRT-LLM's layout. Both rotate halves (NeoX) and normalize in
float32.
"""

import torch
import torch.nn.functional as F  # noqa: N812

from internvl_runtime.engine.pytorch import attention, products, ranks, vision
from internvl_runtime.engine.pytorch import weights as loading
from internvl_runtime.model import config, tensor_parallel

_VOCABULARY_MULTIPLE = 128
"""Rows of lm_head: products with other row counts take up to five times as long on Hopper."""


class LanguageModel:
    """The decoder."""

    def __init__(
        self,
        language: config.LanguageConfig,
        weights: loading.Weights,
        *,
        max_tokens: int,
        group: ranks.Group = ranks.ALONE,
    ) -> None:
        self.language = language
        self.share = tensor_parallel.share(language, group.size)
        self._group = group
        self._embedding = weights["transformer.vocab_embedding.weight"]
        self._norm = weights["transformer.ln_f.weight"]
        self._head = _pad_rows(weights.pop("lm_head.weight"), _VOCABULARY_MULTIPLE)
        every = weights.below("transformer.layers").layers(language.num_hidden_layers)
        self._layers = [_Layer(self.share, layer, language.rms_norm_eps, group) for layer in every]
        self._angles = _angles(language, max_tokens, self._embedding)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of weights and activations."""
        return self._embedding.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return self._embedding.device

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Return the embeddings of token ids [T]: [T, hidden]."""
        return F.embedding(token_ids, self._embedding)

    def forward(
        self,
        hidden: torch.Tensor,
        positions: torch.Tensor,
        last: torch.Tensor,
        attend: attention.Attention,
    ) -> torch.Tensor:
        """Run embeddings [T, hidden] of tokens at positions [T].

        Returns float32 logits [len(last), vocabulary] of the rows `last`.
        """
        cosine, sine = (table[positions].unsqueeze(1) for table in self._angles)
        for number, layer in enumerate(self._layers):
            hidden = layer.forward(hidden, (cosine, sine), attend, number)
        normed = vision.rms_norm(hidden[last], self._norm, self.language.rms_norm_eps)
        own = F.linear(normed, self._head)[:, : self.share.vocabulary_rows]
        return self._group.join(own)[:, : self.language.vocab_size].to(torch.float32)


class _Layer:
    """One rank's share of a decoder layer: q, k and v in one product, gate and up in another."""

    def __init__(
        self,
        share: tensor_parallel.Share,
        weights: loading.Weights,
        eps: float,
        group: ranks.Group,
    ) -> None:
        self._heads = share.heads, share.key_value_heads, share.key_value_heads
        self._size = share.head_size
        self._eps = eps
        self._group = group
        self._input_norm = weights["input_layernorm.weight"]
        self._post_norm = weights["post_layernorm.weight"]
        self._qkv = products.read(weights, "attention.qkv")
        self._dense = products.read(weights, "attention.dense")
        # TensorRT-LLM calls gate_proj `fc`, and up_proj `gate`.
        self._gate_up = products.read_stacked(weights, "mlp.fc", "mlp.gate")
        self._down = products.read(weights, "mlp.proj")

    def forward(
        self,
        hidden: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor],
        attend: attention.Attention,
        number: int,
    ) -> torch.Tensor:
        normed = vision.rms_norm(hidden, self._input_norm, self._eps)
        by_head = self._qkv(normed).view(len(hidden), sum(self._heads), self._size)
        query, key, value = by_head.split(self._heads, dim=1)
        mixed = attend.attend(number, rotate(query, rotation), rotate(key, rotation), value)
        hidden = hidden + self._group.add(self._dense(mixed.flatten(1)))
        normed = vision.rms_norm(hidden, self._post_norm, self._eps)
        gate, up = self._gate_up(normed).chunk(2, dim=-1)
        return hidden + self._group.add(self._down(F.silu(gate) * up))


def rotate(heads: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Apply rotary embeddings to [..., head size], rotating halves."""
    cosine, sine = rotation
    first, second = heads.chunk(2, dim=-1)
    return heads * cosine + torch.cat([-second, first], dim=-1) * sine


def _angles(
    language: config.LanguageConfig, positions: int, like: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosines and sines [positions, head size], computed in float32 on the CPU."""
    size = language.head_size
    exponents = torch.arange(0, size, 2, dtype=torch.int64).to(torch.float32) / size
    frequencies = 1.0 / (language.rope_theta**exponents)
    angles = torch.outer(torch.arange(positions, dtype=torch.float32), frequencies).repeat(1, 2)
    return angles.cos().to(like), angles.sin().to(like)


def _pad_rows(weight: torch.Tensor, multiple: int) -> torch.Tensor:
    """Return a weight [rows, columns] with zero rows up to a multiple."""
    return F.pad(weight, (0, 0, 0, -len(weight) % multiple))
