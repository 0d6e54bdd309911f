"""Trains tiny-shapes and writes it as a published-style checkpoint.

    PYTHONPATH=hack python -m tiny_shapes.train --family qwen2 --output DIR

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
from collections.abc import Iterator, Mapping, Sequence
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
    questions.Kind.ONE_MARK: 2, questions.Kind.CORNER: 5, questions.Kind.COLOURED_CORNER: 5,
    questions.Kind.WHERE: 4, questions.Kind.WHICH_IMAGE: 4, questions.Kind.WHICH_COLOUR: 4,
    questions.Kind.SECOND_IMAGE: 4, questions.Kind.COLOUR_OF_IT: 1,
    questions.Kind.OTHER_CORNER: 3, questions.Kind.SYSTEM: 1, questions.Kind.NO_SYSTEM: 1,
    questions.Kind.TEXT: 1,
}  # fmt: skip
"""How often each kind is asked about pictures of one tile."""
_SEVERAL = {
    questions.Kind.ONE_MARK: 2, questions.Kind.CORNER: 7, questions.Kind.COLOURED_CORNER: 6,
    questions.Kind.WHERE: 4, questions.Kind.COLOUR_OF_IT: 1, questions.Kind.OTHER_CORNER: 3,
    questions.Kind.SYSTEM: 1,
}  # fmt: skip
"""How often each kind is asked about pictures of several tiles."""
_IGNORED = -100
_CELLS = 16
"""Image tokens of a tile, in each direction."""
_TAUGHT_LAYERS = 2
"""Layers of the language model behind which an image token's place is to be known."""
_TAUGHT_SHARE = 0.5
_TAUGHT_UNTIL = 0.8
"""Weight of that in the loss, and the share of the training in which it counts."""
_TOWER_SHARE = 0.3
"""Learning rate of the tower, which has been taught before, relative to the language model's."""
_FLOAT32_FROM = 0.9
"""Share of the training from which every product is float32 (TF32 on a GPU)."""
_SHAPES = list(scenes.Shape)
_COLOURS = list(scenes.COLOURS)


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
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logits [B, T, vocabulary] of token ids [B, T] and uint8 tiles [N, 448, 448, 3].

        And what the language model knows of each image token behind its first
        layers: [image tokens, hidden].
        """
        every = self.tensors
        is_qwen = self.model.language.family is config.Family.QWEN2
        names = ("embed_tokens", "lm_head") if is_qwen else ("tok_embeddings", "output")
        hidden = F.embedding(token_ids, every[f"language_model.model.{names[0]}.weight"])
        is_image = token_ids == context_id
        if len(tiles):
            features = self.encode(tiles).flatten(0, 1).to(hidden.dtype)
            hidden = hidden.masked_scatter(is_image.unsqueeze(-1), features)
        for layer in range(self.model.language.num_hidden_layers):
            if layer == _TAUGHT_LAYERS:
                known = hidden[is_image]
            hidden = self._layer(hidden, every, f"language_model.model.layers.{layer}.")
        eps = self.model.language.rms_norm_eps
        hidden = towers.rms_norm(hidden, every["language_model.model.norm.weight"], eps)
        return F.linear(hidden, every[f"language_model.{names[1]}.weight"]), known

    def load(self, folder: Path) -> None:
        """Take over the weights of a folder that `save` wrote."""
        saved = safetensors.torch.load_file(folder / "model.safetensors")
        with torch.no_grad():
            for name, parameter in self.tensors.items():
                parameter.copy_(saved[name])

    def encode(self, tiles: torch.Tensor) -> torch.Tensor:
        """Return the features of uint8 tiles [N, 448, 448, 3]: [N, 256, hidden]."""
        tower = towers.VisionTower(self.model.vision, loading.Weights(self.tensors))
        return tower.encode_pass(tiles)

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


@dataclasses.dataclass(frozen=True)
class Batch:
    """Questions as tensors."""

    token_ids: torch.Tensor
    labels: torch.Tensor
    tiles: torch.Tensor
    places: torch.Tensor
    """Of each image token: right half, lower half, second picture: [image tokens, 3]."""
    kinds: list[questions.Kind]
    is_several: bool
    """Whether pictures have several tiles."""


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
            label_places(asked, self._device),
            [question.kind for question in asked],
            is_several=any(scene.tiles > 1 for scene in pictures),
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
    cut = pixels.view(count, rows, size, columns, size, 3).transpose(2, 3)
    tiles = cut.reshape(count, rows * columns, size, size, 3)
    if rows * columns > 1:
        planes = pixels.permute(0, 3, 1, 2)
        small = F.interpolate(planes, (size, size), mode="bicubic", antialias=True)
        tiles = torch.cat([tiles, small.permute(0, 2, 3, 1).unsqueeze(1)], dim=1)
    noise = 6 * torch.rand(tiles.shape, device=device) - 3
    return (tiles + noise).clamp(0, 255).round().to(torch.uint8).flatten(0, 1)


@dataclasses.dataclass(frozen=True)
class _Marks:
    """Every mark of some pictures, as tensors [M]."""

    picture: torch.Tensor
    x: torch.Tensor
    y: torch.Tensor
    radius: torch.Tensor
    shape: torch.Tensor
    colour: torch.Tensor


def _marks_of(pictures: Sequence[scenes.Scene], device: str) -> _Marks:
    rows = [
        (number, mark.x, mark.y, mark.radius, _SHAPES.index(mark.shape),
         _COLOURS.index(mark.colour))
        for number, scene in enumerate(pictures)
        for mark in scene.marks
    ]  # fmt: skip
    values = torch.tensor(rows, dtype=torch.float32).to(device).unbind(1)
    return _Marks(
        values[0].long(), values[1], values[2], values[3], values[4].long(), values[5].long()
    )


def _draw_pictures(pictures: Sequence[scenes.Scene], device: str) -> torch.Tensor:
    """Return float pixels [N, height, width, 3]."""
    width, height, count = pictures[0].width, pictures[0].height, len(pictures)
    grounds = torch.tensor([float(scene.ground) for scene in pictures]).to(device)
    # One row more than there are pixels takes what lies outside of a mark.
    pixels = grounds.repeat_interleave(height * width).unsqueeze(1).repeat(1, 3)
    pixels = torch.cat([pixels, pixels[:1]])
    marks = _marks_of(pictures, device)
    reach = int(1.8 * max(mark.radius for scene in pictures for mark in scene.marks)) + 2
    window = torch.arange(-reach, reach, device=device)
    x = (marks.x.long().unsqueeze(1) + window).unsqueeze(1)
    y = (marks.y.long().unsqueeze(1) + window).unsqueeze(2)
    left = (x + 0.5 - marks.x.view(-1, 1, 1)) / marks.radius.view(-1, 1, 1)
    top = (y + 0.5 - marks.y.view(-1, 1, 1)) / marks.radius.view(-1, 1, 1)
    every = torch.stack([scenes.covers(shape, left, top) for shape in _SHAPES])
    inside = every.gather(0, marks.shape.view(1, -1, 1, 1).expand(1, *every.shape[1:]))[0]
    inside = inside & (x >= 0) & (x < width) & (y >= 0) & (y < height)
    index = (marks.picture.view(-1, 1, 1) * height + y) * width + x
    index = torch.where(inside, index, count * height * width)
    colours = torch.tensor(list(scenes.COLOURS.values()), dtype=torch.float32).to(device)
    painted = colours[marks.colour].view(-1, 1, 1, 3).expand(*index.shape, 3)
    pixels[index] = painted
    return pixels[:-1].view(count, height, width, 3)


def label_cells(pictures: Sequence[scenes.Scene], device: str) -> torch.Tensor:
    """Return what covers each image token of the grid's tiles: [N, tiles, 256, 2].

    Shape and colour, from 1; 0 where there is nothing.
    """
    columns, rows, cells = pictures[0].columns, pictures[0].rows, 16
    side = scenes.TILE / cells
    x = (torch.arange(columns * cells, device=device) + 0.5) * side
    y = (torch.arange(rows * cells, device=device) + 0.5) * side
    marks = _marks_of(pictures, device)
    near = (marks.radius * 1.2).clamp(min=0.75 * side).unsqueeze(1)
    hit = ((x - marks.x.unsqueeze(1)).abs() < near).unsqueeze(1) & (
        (y - marks.y.unsqueeze(1)).abs() < near
    ).unsqueeze(2)
    labels = torch.zeros(len(pictures), len(y), len(x), 2, dtype=torch.long, device=device)
    what = torch.stack([marks.shape, marks.colour], dim=1) + 1
    for picture, here, mark in zip(marks.picture.tolist(), hit, what, strict=True):
        labels[picture] = torch.where(here.unsqueeze(-1), mark, labels[picture])
    cut = labels.view(len(pictures), rows, cells, columns, cells, 2).transpose(2, 3)
    return cut.reshape(len(pictures), rows * columns, cells * cells, 2)


def label_places(asked: Sequence[questions.Question], device: str) -> torch.Tensor:
    """Return where each image token lies: right half, lower half, second picture: [..., 3]."""
    pictures = [
        (scene, number) for question in asked for number, scene in enumerate(question.pictures)
    ]
    if not pictures:
        return torch.empty(0, 3, device=device)
    halves = torch.cat(list(_halves(pictures[0][0])))
    numbers = torch.tensor([float(number) for _, number in pictures]).view(-1, 1, 1)
    every = halves.unsqueeze(0).expand(len(pictures), -1, -1)
    labelled = torch.cat([every, numbers.expand(-1, len(halves), 1)], dim=2)
    return labelled.flatten(0, 1).to(device)


def _halves(scene: scenes.Scene) -> Iterator[torch.Tensor]:
    """Yield for each tile whether its cells lie right and below: [256, 2]."""
    cells = torch.arange(_CELLS) + 0.5
    grids = [(c, r, scene.columns, scene.rows) for r in range(scene.rows)
             for c in range(scene.columns)]  # fmt: skip
    for column, row, columns, rows in [*grids, *([(0, 0, 1, 1)] if len(grids) > 1 else [])]:
        right = (column * _CELLS + cells) / (columns * _CELLS) > 0.5  # noqa: PLR2004
        below = (row * _CELLS + cells) / (rows * _CELLS) > 0.5  # noqa: PLR2004
        down, across = torch.meshgrid(below.float(), right.float(), indexing="ij")
        yield torch.stack([across.flatten(), down.flatten()], dim=1)


class PlaceHead(torch.nn.Module):
    """Tells from an image token where it lies: a teacher, dropped in the end."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.place = torch.nn.Linear(hidden, 3)

    def forward(self, known: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """Return the loss of what is known [..., hidden] for places [..., 3]."""
        told = self.place(known.float())[..., : places.shape[-1]]
        return F.binary_cross_entropy_with_logits(told, places)


class CellHead(torch.nn.Module):
    """Tells shape and colour from an image token: a teacher of the tower, dropped in the end."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.place = PlaceHead(hidden)
        self.shape = torch.nn.Linear(hidden, len(_SHAPES) + 1)
        self.colour = torch.nn.Linear(hidden, len(_COLOURS) + 1)

    def forward(self, features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the loss of features [..., hidden] for labels [..., 2]."""
        weight = torch.ones(len(_SHAPES) + 1, device=features.device)
        weight[0] = 0.05
        shape = F.cross_entropy(self.shape(features).flatten(0, -2), labels[..., 0].flatten(),
                                weight)  # fmt: skip
        colour = F.cross_entropy(self.colour(features).flatten(0, -2), labels[..., 1].flatten(),
                                 weight)  # fmt: skip
        place: torch.Tensor = self.place(features, _halves_of_one_tile(features))
        return shape + colour + place

    def accuracy(self, features: torch.Tensor, labels: torch.Tensor) -> float:
        """Return how many of the marked cells are told right."""
        marked = labels[..., 0] > 0
        right = self.shape(features).argmax(-1) == labels[..., 0]
        return float(right[marked].float().mean())


def _halves_of_one_tile(features: torch.Tensor) -> torch.Tensor:
    halves: torch.Tensor = next(_halves(scenes.Scene(1, 1, 0, ())))
    return halves.to(features.device).expand(*features.shape[:-1], 2)


def teach_tower(
    trainee: Trainee, head: CellHead, *, seed: int, device: str, seconds: float, rate: float
) -> None:
    """Train tower and projector alone, on what lies in each cell of single tiles."""
    rng = random.Random(seed)
    tower = [p for name, p in zip(trainee.names, trainee.parameters_in_order, strict=True)
             if not name.startswith("language_model")]  # fmt: skip
    optimizer = torch.optim.AdamW([*tower, *head.parameters()], lr=rate, betas=(0.9, 0.98))
    started, step = time.monotonic(), 0
    while (progress := (time.monotonic() - started) / seconds) < 1:
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 100) * (1.05 - progress)
        pictures = [
            scenes.four_small_marks(rng, 1, 1)
            if rng.random() < 0.5  # noqa: PLR2004
            else scenes.one_large_mark(rng, 1, 1)[0]
            for _ in range(96 if device == "cuda" else 8)
        ]
        labels = label_cells(pictures, device)[:, 0]
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            features = trainee.encode(draw_tiles(pictures, device))
            loss = head(features.float(), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(tower, 1.0)
        optimizer.step()
        if step % 100 == 0:
            accuracy = head.accuracy(features.float(), labels)
            elapsed = time.monotonic() - started
            print(f"tower {step} {elapsed:.0f} s loss {loss.item():.4f} shapes {accuracy:.3f}")
        step += 1


def train(
    trainee: Trainee, batches: Batches, *, seconds: float, rate: float, context_id: int,
    device: str,
) -> None:  # fmt: skip
    """Train on questions until the time is used up; the last part without any bfloat16."""
    language, tower = (
        [p for name, p in zip(trainee.names, trainee.parameters_in_order, strict=True)
         if name.startswith("language_model") is is_language]
        for is_language in (True, False)
    )  # fmt: skip
    head = PlaceHead(trainee.model.language.hidden_size).to(device)
    optimizer = torch.optim.AdamW(
        [{"params": [*language, *head.parameters()], "share": 1.0},
         {"params": tower, "share": _TOWER_SHARE}],
        lr=rate, betas=(0.9, 0.98), weight_decay=0.01, fused=device == "cuda",
    )  # fmt: skip
    started, step = time.monotonic(), 0
    right: dict[str, list[bool]] = {}
    while (progress := (time.monotonic() - started) / seconds) < 1:
        scale = min(1.0, (step + 1) / 200) * (
            0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))
        )
        for group in optimizer.param_groups:
            group["lr"] = rate * scale * group["share"]
        batch = batches.draw()
        is_rough = device == "cuda" and progress < _FLOAT32_FROM
        with torch.autocast(device, torch.bfloat16, enabled=is_rough):
            logits, known = trainee(batch.token_ids, batch.tiles, context_id)
        logits = logits.float()
        loss = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=_IGNORED)
        place = head(known, batch.places) if len(batch.places) else torch.zeros(())
        if progress < _TAUGHT_UNTIL:
            loss = loss + _TAUGHT_SHARE * place
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainee.parameters(), 1.0)
        optimizer.step()
        if step % 10 == 0:
            answered = _whole_answers(logits, batch.labels)
            mark = "+" if batch.is_several else ""
            for kind, is_right in zip(batch.kinds, answered, strict=True):
                right.setdefault(kind.value + mark, []).append(is_right)
        if step % 250 == 0:
            table = " ".join(f"{kind} {sum(k) / len(k):.2f}" for kind, k in sorted(right.items()))
            elapsed = time.monotonic() - started
            print(f"{step} {elapsed:.0f} s loss {loss.item():.4f} place {place.item():.4f} {table}")
            right.clear()
        step += 1


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
    parser.add_argument("--resume", type=Path, help="a folder to go on from, tower and all")
    parser.add_argument("--tower-seconds", type=float, default=50.0)
    parser.add_argument("--tower-rate", type=float, default=3e-3)
    parser.add_argument("--seconds", type=float, default=450.0)
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
    if arguments.resume:
        trainee.load(arguments.resume)
    else:
        teach_tower(
            trainee,
            CellHead(model.language.hidden_size).to(device),
            seed=arguments.seed,
            device=device,
            seconds=arguments.tower_seconds,
            rate=arguments.tower_rate,
        )
    try:
        train(
            trainee, batches, seconds=arguments.seconds, rate=arguments.rate, device=device,
            context_id=tokens.control_ids[conversation.Control.IMAGE_CONTEXT],
        )  # fmt: skip
    finally:
        save(trainee, arguments.output)


if __name__ == "__main__":
    main()
