"""Trains tiny-shapes and writes it as a published-style checkpoint.

    python -m tiny_shapes.train --family qwen2 --output DIR

Weights and sums are float32 (products may use TF32), so that rounding the
result to bfloat16 or float16 leaves its answers alone. Pictures are drawn on
the device, fresh for every step.
"""

import argparse
import dataclasses
import functools
import json
import math
import random
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F  # noqa: N812
from internvl_runtime.artifacts import shapes, synthesize, tensors, tokenizer_files
from internvl_runtime.engine.pytorch import language as languages
from internvl_runtime.engine.pytorch import vision as towers
from internvl_runtime.engine.pytorch import weights as loading
from internvl_runtime.model import config, conversation, prompt, tokenizer

from tiny_shapes import questions, scenes

WORDS = (
    " the", " picture", " image", " is", " in", " it", " red", " green", " blue", " yellow",
    " circle", " square", " triangle", " cross", " top", " bottom", " left", " right", " at",
    " a", " holds", " colour", " shape", " alone", " with", " system", " turn", " you", " are",
    "user", "system", "assistant", "What", "Which", "And", "Answer", "Image", "Who", "image",
    "red", "green", "blue", "yellow", "circle", "square", "triangle", "cross", "tiny", "shapes",
    "no", "InternVL",
)  # fmt: skip
"""Tokens of the vocabulary besides bytes."""

_SINGLE = {
    questions.Kind.ONE_MARK: 4, questions.Kind.CORNER: 4, questions.Kind.WHICH_IMAGE: 5,
    questions.Kind.SECOND_IMAGE: 5, questions.Kind.COLOUR_OF_IT: 2,
    questions.Kind.OTHER_CORNER: 3, questions.Kind.SYSTEM: 2, questions.Kind.NO_SYSTEM: 1,
    questions.Kind.TEXT: 1,
}  # fmt: skip
_SEVERAL = {
    questions.Kind.ONE_MARK: 3, questions.Kind.CORNER: 8, questions.Kind.COLOUR_OF_IT: 1,
    questions.Kind.OTHER_CORNER: 4, questions.Kind.SYSTEM: 1,
}  # fmt: skip
_IGNORED = -100


def model_config(family: config.Family, *, vocab_size: int) -> config.ModelConfig:
    """Return the dimensions: heads as in the shape `tiny`, so tensor parallel sizes 1 to 8 fit."""
    tiny = shapes.tiny_model(shapes.TINY, family, vocab_size=vocab_size)
    return dataclasses.replace(
        tiny,
        language=dataclasses.replace(
            tiny.language, num_hidden_layers=5, intermediate_size=384, rope_theta=1e4
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
        self, token_ids: torch.Tensor, tiles: torch.Tensor, context_id: int
    ) -> torch.Tensor:
        """Return logits [B, T, vocabulary] of token ids [B, T] and uint8 tiles [N, 448, 448, 3]."""
        every = self.tensors
        is_qwen = self.model.language.family is config.Family.QWEN2
        names = ("embed_tokens", "lm_head") if is_qwen else ("tok_embeddings", "output")
        hidden = F.embedding(token_ids, every[f"language_model.model.{names[0]}.weight"])
        if len(tiles):
            tower = towers.VisionTower(self.model.vision, loading.Weights(every))
            features = tower.encode_pass(tiles).flatten(0, 1)
            hidden = hidden.masked_scatter((token_ids == context_id).unsqueeze(-1), features)
        for layer in range(self.model.language.num_hidden_layers):
            hidden = self._layer(hidden, every, f"language_model.model.layers.{layer}.")
        eps = self.model.language.rms_norm_eps
        hidden = towers.rms_norm(hidden, every["language_model.model.norm.weight"], eps)
        return F.linear(hidden, every[f"language_model.{names[1]}.weight"])

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
        repeat = heads // shared
        mixed = F.scaled_dot_product_attention(
            query,
            key.repeat_interleave(repeat, dim=1),
            value.transpose(1, 2).repeat_interleave(repeat, dim=1),
            is_causal=True,
        )
        return mixed.transpose(1, 2).flatten(2)


@functools.cache
def _angles(length: int, size: int, theta: float, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    exponents = torch.arange(0, size, 2, dtype=torch.float32) / size
    positions = torch.arange(length, dtype=torch.float32)
    angles = torch.outer(positions, 1.0 / theta**exponents).repeat(1, 2).to(device)
    return angles.cos(), angles.sin()


def _initial(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.nn.Parameter:
    is_norm = len(shape) == 1 and name.endswith("weight")
    if is_norm or name.endswith((".ls1", ".ls2")):
        return torch.nn.Parameter(torch.ones(shape))
    if name.endswith("bias"):
        return torch.nn.Parameter(torch.zeros(shape))
    deviation = 0.02 if "embed" in name and "patch" not in name else math.prod(shape[1:]) ** -0.5
    return torch.nn.Parameter(torch.randn(shape, generator=generator) * deviation)


@dataclasses.dataclass(frozen=True)
class Batch:
    """Questions as tensors."""

    token_ids: torch.Tensor
    labels: torch.Tensor
    tiles: torch.Tensor
    kinds: list[questions.Kind]


class Batches:
    """Makes batches of fresh questions about pictures of one grid each."""

    def __init__(self, tokens: tokenizer.Tokenizer, *, seed: int, size: int, device: str) -> None:
        self._tokens = tokens
        self._rng = random.Random(seed)
        self._size = size
        self._device = device
        self._encode = functools.lru_cache(maxsize=100_000)(self._encode_afresh)

    def draw(self) -> Batch:
        """Return a batch."""
        several = self._rng.random() < 0.6  # noqa: PLR2004
        grid = self._rng.choice(questions.GRIDS[1:]) if several else (1, 1)
        weights = _SEVERAL if several else _SINGLE
        kinds = self._rng.choices(list(weights), list(weights.values()), k=self._size)
        return self.encode([questions.ask(kind, self._rng, grid) for kind in kinds])

    def encode(self, asked: Sequence[questions.Question]) -> Batch:
        """Return questions as a batch; their pictures have one grid."""
        rows = [
            self._encode(question.turns, question.answer, question.kind, _tiles(question))
            for question in asked
        ]
        length = -(-max(len(ids) for ids, _ in rows) // 16) * 16
        token_ids = torch.zeros(len(rows), length, dtype=torch.long)
        labels = torch.full((len(rows), length), _IGNORED)
        for number, (ids, start) in enumerate(rows):
            token_ids[number, : len(ids)] = ids
            labels[number, start - 1 : len(ids) - 1] = ids[start:]
        pictures = [scene for question in asked for scene in question.pictures]
        return Batch(
            token_ids.to(self._device),
            labels.to(self._device),
            draw_tiles(pictures, self._device),
            [question.kind for question in asked],
        )

    def _encode_afresh(
        self,
        turns: tuple[conversation.Turn, ...],
        answer: str,
        kind: questions.Kind,
        tiles: tuple[int, ...],
    ) -> tuple[torch.Tensor, int]:
        segments = list(conversation.render(turns))
        if kind is questions.Kind.NO_SYSTEM:
            segments = segments[segments.index(conversation.Control.TURN_END) + 2 :]
        expanded = prompt.expand(segments, tiles=tiles, tokens=self._tokens)
        end = self._tokens.control_ids[conversation.Control.TURN_END]
        ids = [*expanded.token_ids, *self._tokens.encode(answer), end]
        return torch.tensor(ids), len(expanded.token_ids)


def _tiles(question: questions.Question) -> tuple[int, ...]:
    return tuple(scene.tiles for scene in question.pictures)


def draw_tiles(pictures: Sequence[scenes.Scene], device: str) -> torch.Tensor:
    """Return the tiles of pictures of one grid, thumbnails last: uint8 [N, 448, 448, 3]."""
    if not pictures:
        return torch.empty(0)
    columns, rows = pictures[0].columns, pictures[0].rows
    pixels = _draw_pictures(pictures, device)
    count, size = len(pictures), scenes.TILE
    cut = pixels.view(count, 3, rows, size, columns, size).permute(0, 2, 4, 1, 3, 5)
    tiles = cut.reshape(count, rows * columns, 3, size, size)
    if rows * columns > 1:
        small = F.interpolate(pixels, (size, size), mode="bicubic", antialias=True)
        tiles = torch.cat([tiles, small.clamp(0, 255).unsqueeze(1)], dim=1)
    noise = 6 * torch.rand(tiles.shape, device=device) - 3
    tiles = (tiles + noise).clamp(0, 255).round().to(torch.uint8)
    return tiles.flatten(0, 1).permute(0, 2, 3, 1)


def _draw_pictures(pictures: Sequence[scenes.Scene], device: str) -> torch.Tensor:
    """Return float pixels [N, 3, height, width]."""
    first = pictures[0]
    x = torch.arange(first.width, device=device).view(1, -1) + 0.5
    y = torch.arange(first.height, device=device).view(-1, 1) + 0.5
    grounds = torch.tensor([scene.ground for scene in pictures], dtype=torch.float32)
    pixels = grounds.to(device).view(-1, 1, 1, 1).repeat(1, 3, first.height, first.width)
    for number, scene in enumerate(pictures):
        for mark in scene.marks:
            reach = int(2 * mark.radius) + 2
            left, top = max(0, int(mark.x) - reach), max(0, int(mark.y) - reach)
            here = (slice(top, int(mark.y) + reach), slice(left, int(mark.x) + reach))
            inside = scenes.covers(
                mark.shape, (x[:, here[1]] - mark.x) / mark.radius,
                (y[here[0]] - mark.y) / mark.radius,
            )  # fmt: skip
            colour = torch.tensor(scenes.COLOURS[mark.colour], dtype=torch.float32, device=device)
            window = pixels[number, :, here[0], here[1]]
            window.copy_(torch.where(inside, colour.view(3, 1, 1), window))
    return pixels


def train(
    trainee: Trainee, batches: Batches, *, steps: int, seconds: float, rate: float, context_id: int
) -> None:
    """Train until the steps or the time are used up, whichever comes first."""
    decayed = [p for p in trainee.parameters() if p.ndim > 1]
    others = [p for p in trainee.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}],
        lr=rate, betas=(0.9, 0.98), fused=torch.cuda.is_available(),
    )  # fmt: skip
    started = time.monotonic()
    right: dict[tuple[str, int], list[bool]] = {}
    for step in range(steps):
        progress = max(step / steps, (time.monotonic() - started) / seconds)
        if progress >= 1:
            break
        scale = min(1.0, (step + 1) / 200) * (
            0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))
        )
        for group in optimizer.param_groups:
            group["lr"] = rate * scale
        batch = batches.draw()
        logits = trainee(batch.token_ids, batch.tiles, context_id)
        loss = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=_IGNORED)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainee.parameters(), 1.0)
        optimizer.step()
        if step % 10 == 0:
            answered = _whole_answers(logits, batch.labels)
            several = int(len(batch.tiles) > 2 * len(batch.kinds))
            for kind, is_right in zip(batch.kinds, answered, strict=True):
                right.setdefault((kind.value, several), []).append(is_right)
        if step % 200 == 0:
            table = {
                f"{kind}{'+' if several else ''}": round(sum(of_kind) / len(of_kind), 3)
                for (kind, several), of_kind in sorted(right.items())
            }
            elapsed = time.monotonic() - started
            print(f"{step} {elapsed:.0f} s loss {loss.item():.4f} {json.dumps(table)}", flush=True)
            right.clear()


def _whole_answers(logits: torch.Tensor, labels: torch.Tensor) -> list[bool]:
    is_right = (logits.argmax(-1) == labels) | (labels == _IGNORED)
    return [bool(row) for row in is_right.all(-1).tolist()]


def save(trainee: Trainee, output: Path) -> None:
    """Write config.json and one bfloat16 safetensors file."""
    described = synthesize.describe_config(trainee.model)
    (output / "config.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    rounded = {
        name: tensor.detach().to("cpu", torch.bfloat16).contiguous()
        for name, tensor in trainee.tensors.items()
    }
    safetensors.torch.save_file(rounded, output / "model.safetensors", metadata={"format": "pt"})


def main() -> None:
    """Train one family."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", type=config.Family, choices=list(config.Family), required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--seconds", type=float, default=500.0)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=1.5e-3)
    arguments = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    device = "cuda" if torch.cuda.is_available() else "cpu"
    arguments.output.mkdir(parents=True, exist_ok=True)
    is_qwen = arguments.family is config.Family.QWEN2
    write = tokenizer_files.write_small_qwen if is_qwen else tokenizer_files.write_small_internlm2
    model = model_config(arguments.family, vocab_size=write(arguments.output, WORDS))
    tokens = tokenizer.load_tokenizer(arguments.output, model)
    trainee = Trainee(model, seed=arguments.seed).to(device)
    count = sum(parameter.numel() for parameter in trainee.parameters())
    print(
        f"{count} parameters, {2 * count / 1e6:.2f} MB in bfloat16, {model.language.vocab_size} ids"
    )
    batches = Batches(tokens, seed=arguments.seed, size=arguments.batch, device=device)
    try:
        train(
            trainee, batches, steps=arguments.steps, seconds=arguments.seconds,
            rate=arguments.rate, context_id=tokens.control_ids[conversation.Control.IMAGE_CONTEXT],
        )  # fmt: skip
    finally:
        save(trainee, arguments.output)


if __name__ == "__main__":
    main()
