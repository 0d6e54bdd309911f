"""The forward pass of a published checkpoint, a layer in memory at a time.

Engines are held against it. It reads the published files by their published
names and shares no code with an engine, so that neither a wrong conversion nor
a wrong product can hide. Source: `modeling_intern_vit.py`,
`modeling_internvl_chat.py` and `modeling_internlm2.py` of
https://github.com/OpenGVLab/InternVL, and transformers' `modeling_qwen2.py`.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812

from internvl_runtime.artifacts import progress, tensor_stream
from internvl_runtime.model import config

_MEAN = (0.485, 0.456, 0.406)
_STD = (0.229, 0.224, 0.225)
_PROJECTOR_EPS = 1e-5

_FP8 = torch.float8_e4m3fn
_FP8_MOST = 448.0
_LAYERS = "language_model.model.layers."


@dataclasses.dataclass(frozen=True)
class Tensors:
    """What lies below one prefix, rounded to a lane's dtype."""

    by_name: Mapping[str, torch.Tensor]
    fp8: bool

    def __getitem__(self, name: str) -> torch.Tensor:
        """Return a tensor."""
        return self.by_name[name]

    def linear(self, states: torch.Tensor, name: str) -> torch.Tensor:
        """Multiply with a weight (out, in), and add its bias where there is one."""
        weight, bias = self.by_name[f"{name}.weight"], self.by_name.get(f"{name}.bias")
        if not self.fp8:
            return F.linear(states, weight, bias)
        product = F.linear(_round_rows(states), _round_rows(weight)).to(states.dtype)
        return product if bias is None else product + bias


def _round_rows(rows: torch.Tensor) -> torch.Tensor:
    """Round to E4M3 with a scale a row; returns float32."""
    scales = rows.float().abs().amax(-1, keepdim=True).clamp(min=1e-12) / _FP8_MOST
    return (rows.float() / scales).to(_FP8).float() * scales


Stage = tuple[str, Callable[[torch.Tensor, Tensors], torch.Tensor]]
"""A prefix of published names, and what the tensors below it do to the hidden states."""


@dataclasses.dataclass(frozen=True)
class Asked:
    """A prompt, its answer's first tokens, and the pictures in it."""

    token_ids: Sequence[int]
    picture_tokens: Sequence[int]
    """Positions that the features of the tiles take, in their order."""
    tiles: npt.NDArray[np.uint8]
    """[N, 448, 448, 3]."""
    last: int
    """How many logits are wanted, from the end."""


@dataclasses.dataclass(frozen=True)
class Lane:
    """One way of rounding."""

    dtype: torch.dtype
    fp8: bool = False
    """Whether weight rows and tokens of the decoder's products are rounded to E4M3 besides."""


EXACT = Lane(torch.float32)


@dataclasses.dataclass(frozen=True)
class Computed:
    """What one prompt gives in one lane, in float32 on the CPU."""

    logits: torch.Tensor
    """[last, vocabulary]"""
    features: torch.Tensor
    """[image tokens, hidden size of the language model]"""


def compute(
    folder: Path,
    model: config.ModelConfig,
    every: Sequence[Asked],
    *,
    lanes: Sequence[Lane],
    device: torch.device,
    report: progress.Report,
) -> list[list[Computed]]:
    """Return for each that was asked what it gives in each lane.

    All of them go through a layer while it is in memory.
    """
    with tensor_stream.Reader(folder) as reader, torch.inference_mode():
        runner = _Runner(reader, lanes, device, report, model)
        pixels = [_normalize(asked.tiles).to(device) for asked in every]
        encoded = runner.run(_tower(model.vision), [[each] * len(lanes) for each in pixels])
        features = [[each.flatten(0, 1) for each in own] for own in encoded]
        ids = [torch.tensor(asked.token_ids, device=device) for asked in every]
        hidden = runner.run([_embedding(model)], [[each] * len(lanes) for each in ids])
        for asked, own, found in zip(every, hidden, features, strict=True):
            for given, seen in zip(own, found, strict=True):
                given[torch.tensor(asked.picture_tokens, dtype=torch.long)] = seen
        hidden = runner.run(_decoder(model.language), hidden)
        ends = [[each[-a.last :] for each in own] for a, own in zip(every, hidden, strict=True)]
        logits = runner.run([_head(model)], ends)
    return [
        [Computed(*(each.float().cpu() for each in pair)) for pair in zip(*own, strict=True)]
        for own in zip(logits, features, strict=True)
    ]


class _Runner:
    """Runs stages over the hidden states of every prompt in every dtype."""

    def __init__(
        self,
        reader: tensor_stream.Reader,
        lanes: Sequence[Lane],
        device: torch.device,
        report: progress.Report,
        model: config.ModelConfig,
    ) -> None:
        self._reader, self._lanes, self._device = reader, lanes, device
        self._report = report
        self._done = 0
        self._total = model.vision.num_hidden_layers + model.language.num_hidden_layers + 5

    def run(
        self, stages: Iterable[Stage], states: Sequence[Sequence[torch.Tensor]]
    ) -> list[list[torch.Tensor]]:
        """Return the states behind the last stage: for each prompt, one of each lane."""
        current = [list(own) for own in states]
        for prefix, step in stages:
            loaded = self._load(prefix)
            for number, lane in enumerate(self._lanes):
                rounded = {name: tensor.to(lane.dtype) for name, tensor in loaded.items()}
                tensors = Tensors(rounded, lane.fp8 and prefix.startswith(_LAYERS))
                for own in current:
                    given = own[number]
                    wide = given.is_floating_point()
                    own[number] = step(given.to(lane.dtype) if wide else given, tensors)
            self._done += 1
            self._report(self._done, self._total)
        return current

    def _load(self, prefix: str) -> dict[str, torch.Tensor]:
        names = self._reader.names_below(prefix)
        arrays = self._reader.load(names)
        return {
            name.removeprefix(prefix): _to_torch(array).to(self._device)
            for name, array in zip(names, arrays, strict=True)
        }


def _to_torch(array: npt.NDArray[Any]) -> torch.Tensor:
    """Copy an array, bfloat16 too, which torch does not take from numpy."""
    if array.dtype == np.float32:
        return torch.from_numpy(array).clone()
    if array.dtype == np.float16:
        return torch.from_numpy(array).float()
    return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16).float()


def _normalize(tiles: npt.NDArray[np.uint8]) -> torch.Tensor:
    pixels = torch.from_numpy(tiles).permute(0, 3, 1, 2).float() / 255
    return (pixels - torch.tensor(_MEAN).view(3, 1, 1)) / torch.tensor(_STD).view(3, 1, 1)


def _tower(vision: config.VisionConfig) -> Iterator[Stage]:
    def embed(pixels: torch.Tensor, own: Tensors) -> torch.Tensor:
        patches = F.conv2d(
            pixels, own["patch_embedding.weight"], own["patch_embedding.bias"], stride=14
        )
        rows = patches.flatten(2).transpose(1, 2)
        first = own["class_embedding"].expand(len(pixels), 1, -1)
        return torch.cat([first, rows], dim=1) + own["position_embedding"]

    def layer(hidden: torch.Tensor, own: Tensors) -> torch.Tensor:
        def norm(states: torch.Tensor, name: str) -> torch.Tensor:
            weight = own[f"{name}.weight"]
            if vision.norm_type == "rms_norm":
                return _rms_norm(states, weight, vision.layer_norm_eps)
            return F.layer_norm(
                states, weight.shape, weight, own[f"{name}.bias"], vision.layer_norm_eps
            )

        width = hidden.shape[-1]
        qkv = own.linear(norm(hidden, "norm1"), "attn.qkv")
        query, key, value = qkv.split(width, dim=-1)
        if vision.qk_normalization:
            query = _rms_norm(query, own["attn.q_norm.weight"], vision.layer_norm_eps)
            key = _rms_norm(key, own["attn.k_norm.weight"], vision.layer_norm_eps)
        heads = (
            part.unflatten(-1, (vision.num_attention_heads, vision.head_size)).transpose(1, 2)
            for part in (query, key, value)
        )
        mixed = _attend(*heads).transpose(1, 2).flatten(2)
        hidden = hidden + own.linear(mixed, "attn.proj") * own["ls1"]
        inner = own.linear(norm(hidden, "norm2"), "mlp.fc1")
        inner = own.linear(F.gelu(inner), "mlp.fc2")
        return hidden + inner * own["ls2"]

    def project(hidden: torch.Tensor, own: Tensors) -> torch.Tensor:
        tokens = _shuffle(hidden[:, 1:])
        tokens = F.layer_norm(
            tokens, own["0.weight"].shape, own["0.weight"], own["0.bias"], _PROJECTOR_EPS
        )
        return own.linear(F.gelu(own.linear(tokens, "1")), "3")

    yield "vision_model.embeddings.", embed
    for number in range(vision.num_hidden_layers):
        yield f"vision_model.encoder.layers.{number}.", layer
    yield "mlp1.", project


def _shuffle(hidden: torch.Tensor) -> torch.Tensor:
    """`pixel_shuffle` of the authors, version v2: [N, 32 * 32, h] to [N, 16 * 16, 4 * h]."""
    count, tokens, width = hidden.shape
    side = int(tokens**0.5)
    halved = hidden.reshape(count, side, side // 2, width * 2).permute(0, 2, 1, 3)
    halved = halved.reshape(count, side // 2, side // 2, width * 4).permute(0, 2, 1, 3)
    return halved.reshape(count, tokens // 4, width * 4)


def _decoder(language: config.LanguageConfig) -> Iterator[Stage]:
    split = _split_qwen2 if language.family is config.Family.QWEN2 else _split_internlm2
    names = _QWEN2 if language.family is config.Family.QWEN2 else _INTERNLM2

    def layer(hidden: torch.Tensor, own: Tensors) -> torch.Tensor:
        normed = _rms_norm(hidden, own[f"{names['norm 1']}.weight"], language.rms_norm_eps)
        query, key, value = (
            part.view(len(hidden), -1, language.head_size).transpose(0, 1)
            for part in split(normed, own, language)
        )
        group = language.num_attention_heads // language.num_key_value_heads
        mixed = _attend(
            _rotate(query, language.rope_theta),
            _rotate(key, language.rope_theta).repeat_interleave(group, dim=0),
            value.repeat_interleave(group, dim=0),
            is_causal=True,
        )
        hidden = hidden + own.linear(mixed.transpose(0, 1).flatten(1), names["out"])
        normed = _rms_norm(hidden, own[f"{names['norm 2']}.weight"], language.rms_norm_eps)
        gate, up = own.linear(normed, names["gate"]), own.linear(normed, names["up"])
        return hidden + own.linear(F.silu(gate) * up, names["down"])

    def normalize(hidden: torch.Tensor, own: Tensors) -> torch.Tensor:
        return _rms_norm(hidden, own["weight"], language.rms_norm_eps)

    for number in range(language.num_hidden_layers):
        yield f"language_model.model.layers.{number}.", layer
    yield "language_model.model.norm.", normalize


_QWEN2 = {
    "norm 1": "input_layernorm",
    "norm 2": "post_attention_layernorm",
    "out": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
_INTERNLM2 = {
    "norm 1": "attention_norm",
    "norm 2": "ffn_norm",
    "out": "attention.wo",
    "gate": "feed_forward.w1",
    "up": "feed_forward.w3",
    "down": "feed_forward.w2",
}


def _split_qwen2(
    normed: torch.Tensor, own: Tensors, language: config.LanguageConfig
) -> list[torch.Tensor]:
    del language
    return [own.linear(normed, f"self_attn.{letter}_proj") for letter in "qkv"]


def _split_internlm2(
    normed: torch.Tensor, own: Tensors, language: config.LanguageConfig
) -> list[torch.Tensor]:
    """Rows of wqkv come by key/value head: its queries, its key, its value."""
    fused = own.linear(normed, "attention.wqkv")
    grouped = fused.view(len(normed), language.num_key_value_heads, -1, language.head_size)
    return [part.flatten(1) for part in (grouped[:, :, :-2], grouped[:, :, -2], grouped[:, :, -1])]


def _embedding(model: config.ModelConfig) -> Stage:
    is_qwen2 = model.language.family is config.Family.QWEN2
    name = "embed_tokens" if is_qwen2 else "tok_embeddings"
    return (
        f"language_model.model.{name}.",
        lambda token_ids, own: F.embedding(token_ids, own["weight"]),
    )


def _head(model: config.ModelConfig) -> Stage:
    is_qwen2 = model.language.family is config.Family.QWEN2
    name = "lm_head" if is_qwen2 else "output"
    return f"language_model.{name}.", lambda hidden, own: F.linear(hidden, own["weight"])


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, is_causal: bool = False
) -> torch.Tensor:
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    if is_causal:
        future = torch.ones_like(scores, dtype=torch.bool).triu(1)
        scores = scores.masked_fill(future, -math.inf)
    return scores.float().softmax(-1).to(value.dtype) @ value


def _rotate(heads: torch.Tensor, theta: float) -> torch.Tensor:
    """Rotary embedding of [heads, tokens, size] from position 0, halves rotated."""
    _, tokens, size = heads.shape
    frequencies = torch.pow(theta, -torch.arange(0, size, 2).float() / size)
    angles = torch.outer(torch.arange(tokens).float(), frequencies).repeat(1, 2)
    cosine, sine = angles.cos().to(heads), angles.sin().to(heads)
    first, second = heads.chunk(2, dim=-1)
    return heads * cosine + torch.cat([-second, first], dim=-1) * sine


def _rms_norm(hidden: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = hidden.float()
    normed = wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    scaled: torch.Tensor = weight * normed.to(hidden.dtype)
    return scaled
