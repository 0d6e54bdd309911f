"""The model while it learns: every tensor under its published name, with gradients."""

import dataclasses
import functools
import json
import math
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F  # noqa: N812
from internvl_runtime.artifacts import shapes, synthesize, tensors
from internvl_runtime.engine.pytorch import language as languages
from internvl_runtime.engine.pytorch import vision as towers
from internvl_runtime.engine.pytorch import weights as loading
from internvl_runtime.model import config

TAUGHT_LAYER = 3
"""The layer of the language model whose input holds an image token's place, and whose attention
goes from an answer to what it is about."""
LOOKING_HEADS = (0, 4)
"""Query heads of that attention: one for each key head."""


def model_config(
    family: config.Family, *, vocab_size: int, rope_theta: float
) -> config.ModelConfig:
    """Return the dimensions: heads as in the shape `tiny`, so tensor parallel sizes 1 to 8 fit."""
    tiny = shapes.tiny_model(shapes.TINY, family, vocab_size=vocab_size)
    return dataclasses.replace(
        tiny,
        language=dataclasses.replace(
            tiny.language, num_hidden_layers=6, intermediate_size=384, rope_theta=rope_theta
        ),
        vision=dataclasses.replace(tiny.vision, num_hidden_layers=3, intermediate_size=256),
    )


class Trainee(torch.nn.Module):
    """The model with its tensors under their published names."""

    def __init__(self, model: config.ModelConfig, *, seed: int) -> None:
        super().__init__()
        self.model = model
        generator = torch.Generator().manual_seed(seed)
        self.names = [name for name, _ in tensors.list_tensors(model)]
        self.parameters_in_order = torch.nn.ParameterList(
            _initial(name, shape, generator) for name, shape in tensors.list_tensors(model)
        )

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """Tensors by their published names."""
        return dict(zip(self.names, self.parameters_in_order, strict=True))

    def forward(
        self,
        token_ids: torch.Tensor,
        features: torch.Tensor,
        *,
        is_image: torch.Tensor,
        is_wanted: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logits of the wanted tokens of texts, and what goes into layer `TAUGHT_LAYER`.

        Token ids, `is_image` and `is_wanted` are [B, T]; features [N, 256,
        hidden] go where images are. Returns [wanted, vocabulary] and [B, T,
        hidden].
        """
        every = self.tensors
        is_qwen = self.model.language.family is config.Family.QWEN2
        names = ("embed_tokens", "lm_head") if is_qwen else ("tok_embeddings", "output")
        hidden = F.embedding(token_ids, every[f"language_model.model.{names[0]}.weight"])
        hidden = hidden.masked_scatter(is_image.unsqueeze(-1), features.to(hidden.dtype))
        for layer in range(self.model.language.num_hidden_layers):
            if layer == TAUGHT_LAYER:
                known = hidden
            hidden = self._layer(hidden, every, f"language_model.model.layers.{layer}.")
        eps = self.model.language.rms_norm_eps
        norm = every["language_model.model.norm.weight"]
        hidden = towers.rms_norm(hidden[is_wanted], norm, eps)
        return F.linear(hidden, every[f"language_model.{names[1]}.weight"]), known

    @property
    def language(self) -> list[torch.Tensor]:
        """Parameters of the language model."""
        return self._of(is_language=True)

    @property
    def tower(self) -> list[torch.Tensor]:
        """Parameters of the vision tower and the projector."""
        return self._of(is_language=False)

    def _of(self, *, is_language: bool) -> list[torch.Tensor]:
        return [
            parameter
            for name, parameter in self.tensors.items()
            if name.startswith("language_model") is is_language
        ]

    def load(self, folder: Path) -> None:
        """Take over the weights of a folder that `save` wrote."""
        saved = safetensors.torch.load_file(folder / "model.safetensors")
        with torch.no_grad():
            for name, parameter in self.tensors.items():
                parameter.copy_(saved[name])

    def save(self, output: Path) -> None:
        """Write config.json and one bfloat16 safetensors file."""
        described = synthesize.describe_config(self.model)
        (output / "config.json").write_text(
            json.dumps(described, indent=2) + "\n", encoding="utf-8"
        )
        rounded = {
            name: tensor.detach().to("cpu", torch.bfloat16).contiguous()
            for name, tensor in self.tensors.items()
        }
        safetensors.torch.save_file(
            rounded, output / "model.safetensors", metadata={"format": "pt"}
        )

    def encode(self, tiles: torch.Tensor) -> torch.Tensor:
        """Return the features of uint8 tiles [N, 448, 448, 3]: [N, 256, hidden]."""
        tower = towers.VisionTower(self.model.vision, loading.Weights(self.tensors))
        return tower.encode(tiles)

    def _layer(
        self, hidden: torch.Tensor, every: Mapping[str, torch.Tensor], root: str
    ) -> torch.Tensor:
        language = self.model.language
        is_qwen = language.family is config.Family.QWEN2
        norms = (
            ("input_layernorm", "post_attention_layernorm")
            if is_qwen
            else ("attention_norm", "ffn_norm")
        )
        normed = towers.rms_norm(hidden, every[f"{root}{norms[0]}.weight"], language.rms_norm_eps)
        output = "self_attn.o_proj" if is_qwen else "attention.wo"
        mixed = self._attend(normed, every, root)
        hidden = hidden + F.linear(mixed, every[f"{root}{output}.weight"])
        normed = towers.rms_norm(hidden, every[f"{root}{norms[1]}.weight"], language.rms_norm_eps)
        gate, up, down = (
            ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
            if is_qwen
            else ("feed_forward.w1", "feed_forward.w3", "feed_forward.w2")
        )
        inner = F.silu(F.linear(normed, every[f"{root}{gate}.weight"]))
        inner = inner * F.linear(normed, every[f"{root}{up}.weight"])
        return hidden + F.linear(inner, every[f"{root}{down}.weight"])

    def _attend(
        self, hidden: torch.Tensor, every: Mapping[str, torch.Tensor], root: str
    ) -> torch.Tensor:
        query, key, value = self._project(hidden, every, root)
        repeat = query.shape[1] // key.shape[1]
        mixed = F.scaled_dot_product_attention(
            query,
            key.repeat_interleave(repeat, dim=1),
            value.repeat_interleave(repeat, dim=1),
            is_causal=True,
        )
        return mixed.transpose(1, 2).flatten(2)

    def look(
        self, known: torch.Tensor, texts: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """Return where tokens look in layer `TAUGHT_LAYER`: log-probabilities [N, heads, T].

        `known` [B, T, hidden] goes into that layer; token i is the one at
        `positions[i]` of text `texts[i]`.
        """
        every = self.tensors
        root = f"language_model.model.layers.{TAUGHT_LAYER}."
        is_qwen = self.model.language.family is config.Family.QWEN2
        norm = every[f"{root}{'input_layernorm' if is_qwen else 'attention_norm'}.weight"]
        normed = towers.rms_norm(known, norm, self.model.language.rms_norm_eps)
        query, key, _ = self._project(normed, every, root)
        repeat = query.shape[1] // key.shape[1]
        heads = torch.tensor(LOOKING_HEADS, device=known.device)
        asked = query[texts.unsqueeze(1), heads, positions.unsqueeze(1)].float()
        seen = key[texts.unsqueeze(1), heads // repeat].float()
        scores = torch.einsum("nhd,nhtd->nht", asked, seen) / query.shape[-1] ** 0.5
        later = torch.arange(known.shape[1], device=known.device) > positions.unsqueeze(1)
        looks: torch.Tensor = scores.masked_fill(later.unsqueeze(1), -torch.inf).log_softmax(-1)
        return looks

    def _project(
        self, hidden: torch.Tensor, every: Mapping[str, torch.Tensor], root: str
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return rotated queries and keys, and values: [B, heads, T, head size] each."""
        language = self.model.language
        heads, shared, size = (
            language.num_attention_heads, language.num_key_value_heads, language.head_size,
        )  # fmt: skip
        batch, length, _ = hidden.shape
        if language.family is config.Family.QWEN2:
            query, key, value = (
                F.linear(
                    hidden,
                    every[f"{root}self_attn.{x}_proj.weight"],
                    every[f"{root}self_attn.{x}_proj.bias"],
                ).view(batch, length, -1, size)
                for x in "qkv"
            )
        else:
            grouped = F.linear(hidden, every[f"{root}attention.wqkv.weight"])
            grouped = grouped.view(batch, length, shared, heads // shared + 2, size)
            query, key, value = grouped.split([heads // shared, 1, 1], dim=3)
            query, key, value = query.flatten(2, 3), key.flatten(2, 3), value.flatten(2, 3)
        angles = _angles(length, size, language.rope_theta, str(hidden.device))
        query, key = (languages.rotate(part.transpose(1, 2), angles) for part in (query, key))
        return query, key, value.transpose(1, 2)


@functools.cache
def _angles(length: int, size: int, theta: float, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    exponents = torch.arange(0, size, 2, dtype=torch.float32) / size
    positions = torch.arange(length, dtype=torch.float32)
    angles = torch.outer(positions, 1.0 / theta**exponents).repeat(1, 2).to(device)
    return angles.cos(), angles.sin()


def _initial(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.nn.Parameter:
    if name.endswith("position_embedding"):
        return torch.nn.Parameter(_waves(shape[2]))
    is_norm = len(shape) == 1 and name.endswith("weight")
    if is_norm or name.endswith((".ls1", ".ls2")):
        return torch.nn.Parameter(torch.ones(shape))
    if name.endswith("bias"):
        return torch.nn.Parameter(torch.zeros(shape))
    deviation = 0.02 if "embed" in name and "patch" not in name else math.prod(shape[1:]) ** -0.5
    return torch.nn.Parameter(torch.randn(shape, generator=generator) * deviation)


def _waves(hidden: int) -> torch.Tensor:
    """Return sines and cosines of column and row: neighbours find each other from the start."""
    side = config.TILE_SIZE // config.PATCH_SIZE
    frequencies = math.pi / 2 ** torch.linspace(0, 5, hidden // 4)
    angles = torch.outer(torch.arange(side), frequencies)
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)
    columns = waves.unsqueeze(0).expand(side, side, -1)
    rows = waves.unsqueeze(1).expand(side, side, -1)
    patches = torch.cat([columns, rows], dim=2).flatten(0, 1)
    return 0.5 * torch.cat([torch.zeros(1, hidden), patches]).unsqueeze(0)
