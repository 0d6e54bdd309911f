"""Trains tiny-shapes and writes it as a published-style checkpoint.

    PYTHONPATH=hack python -m tiny_shapes.train --family qwen2 --output DIR

Three lessons: the vision tower learns what lies in each cell of a tile; the
language model learns to answer about a store of encoded pictures; both learn
to answer about pictures that are drawn afresh for every step. Weights are
float32, and the last steps' products too (TF32 on a GPU), so that rounding
the result to bfloat16 or float16 leaves its answers alone.
"""

import argparse
import dataclasses
import functools
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812
from internvl_runtime.artifacts import tokenizer_files
from internvl_runtime.model import config, conversation, prompt, tokenizer

from tiny_shapes import drawing, questions, scenes, teachers, trainee
from tiny_shapes.scenes import Layout

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
    questions.Kind.WHERE: 7, questions.Kind.WHICH_IMAGE: 14, questions.Kind.WHICH_COLOUR: 7,
    questions.Kind.SECOND_IMAGE: 4, questions.Kind.COLOUR_OF_IT: 1,
    questions.Kind.OTHER_CORNER: 3, questions.Kind.SYSTEM: 1, questions.Kind.NO_SYSTEM: 1,
    questions.Kind.TEXT: 1, questions.Kind.GUESS: 1,
}  # fmt: skip
"""How often each kind is asked about pictures of one tile."""
_SEVERAL = {
    questions.Kind.ONE_MARK: 2, questions.Kind.CORNER: 7, questions.Kind.COLOURED_CORNER: 6,
    questions.Kind.WHERE: 8, questions.Kind.COLOUR_OF_IT: 1, questions.Kind.OTHER_CORNER: 3,
    questions.Kind.SYSTEM: 1,
}  # fmt: skip
"""How often each kind is asked about pictures of several tiles."""
_IGNORED = -100
_SEVERAL_SHARE = 0.6
"""How many batches are about pictures of several tiles."""
_TAUGHT_SHARE = 0.5
"""Weight in the loss of knowing where image tokens lie, and of looking at the right ones."""
_TOWER_SHARE = 0.3
"""Learning rate of the tower in the last lesson, relative to the language model's."""
_LAST_SHARE = 0.4
"""Learning rate of the last lesson, relative to the one before."""
_FLOAT32_FROM = 0.6
"""Share of the last lesson from which every product is float32 (TF32 on a GPU)."""
_LOG_EVERY = 500


@dataclasses.dataclass(frozen=True)
class Lesson:
    """How long to learn: until as many steps are done or as many seconds are over."""

    name: str
    steps: int
    seconds: float

    def progress(self) -> Iterator[tuple[int, float]]:
        """Yield each step's number and the share of the lesson that is over."""
        started = time.monotonic()
        for step in range(self.steps):
            share = max(step / self.steps, (time.monotonic() - started) / self.seconds)
            if share >= 1:
                return
            yield step, share


@dataclasses.dataclass(frozen=True)
class Batch:
    """Questions as tensors."""

    token_ids: torch.Tensor
    """[B, T]"""
    labels: torch.Tensor
    """[B, T]: the answer's tokens, one place to the left."""
    places: torch.Tensor
    """[image tokens, 4] of `drawing.label_places`."""
    is_image: torch.Tensor
    """[B, T]"""
    subjects: torch.Tensor
    """[B, T]: image tokens that show what the answer is about."""
    asked: list[questions.Question]

    @property
    def is_answer(self) -> torch.Tensor:
        """[B, T]: tokens behind which one of the answer's is to come."""
        return self.labels != _IGNORED


class Questions:
    """Makes batches of fresh questions, each about pictures of one grid."""

    def __init__(self, tokens: tokenizer.Tokenizer, *, seed: int, size: int, device: str) -> None:
        self.context_id = tokens.control_ids[conversation.Control.IMAGE_CONTEXT]
        self._tokens = tokens
        self._rng = random.Random(seed)
        self._size = size
        self._device = device
        self._encode = functools.lru_cache(maxsize=100_000)(self._encode_afresh)

    def ask(self, draw: Callable[[questions.Grid, Layout], scenes.Scene]) -> Batch:
        """Return a batch about pictures that `draw` returns."""
        several = self._rng.random() < _SEVERAL_SHARE
        grid = self._rng.choice(questions.GRIDS[1:]) if several else (1, 1)
        weights = _SEVERAL if several else _SINGLE
        kinds = self._rng.choices(list(weights), list(weights.values()), k=self._size)
        own = functools.partial(draw, grid)
        return self.encode([questions.ask_about(kind, self._rng, own) for kind in kinds])

    def encode(self, asked: list[questions.Question]) -> Batch:
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
        token_ids = token_ids.to(self._device)
        is_image = token_ids == self.context_id
        subjects = torch.zeros_like(is_image)
        return Batch(
            token_ids=token_ids,
            labels=labels.to(self._device),
            places=drawing.label_places(asked, self._device),
            is_image=is_image,
            subjects=subjects.masked_scatter(is_image, drawing.label_subjects(asked, self._device)),
            asked=asked,
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


class Store:
    """Scenes with the features that the tower, as it is now, gives their tiles."""

    def __init__(self, model: trainee.Trainee, *, seed: int, count: int, device: str) -> None:
        self._rng = random.Random(f"store/{seed}")
        self._scenes: dict[tuple[questions.Grid, Layout], list[scenes.Scene]] = {}
        self._features: dict[questions.Grid, torch.Tensor] = {}
        self._rows: dict[int, int] = {}
        for grid in questions.GRIDS:
            drawn = [
                scenes.compose(layout, self._rng, *grid)
                for layout in Layout
                for _ in range(count if grid != (1, 1) else 4 * count)
            ]
            for row, scene in enumerate(drawn):
                self._rows[id(scene)] = row
            share = len(drawn) // len(Layout)
            for number, layout in enumerate(Layout):
                self._scenes[grid, layout] = drawn[number * share : (number + 1) * share]
            self._features[grid] = _encode_all(model, drawn, device)

    def draw(self, grid: questions.Grid, layout: Layout) -> scenes.Scene:
        """Return one of the scenes."""
        return self._rng.choice(self._scenes[grid, layout])

    def features(self, batch: Batch) -> torch.Tensor:
        """Return the features of a batch's tiles: [N, 256, hidden]."""
        pictures = _pictures(batch)
        rows = torch.tensor([self._rows[id(scene)] for scene in pictures])
        every = self._features[pictures[0].columns, pictures[0].rows]
        return every[rows.to(every.device)].flatten(0, 1)


@torch.no_grad()
def _encode_all(model: trainee.Trainee, drawn: Sequence[scenes.Scene], device: str) -> torch.Tensor:
    """Return [scenes, tiles, 256, hidden] in bfloat16."""
    parts = []
    for start in range(0, len(drawn), 64):
        part = drawn[start : start + 64]
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            features = model.encode(drawing.draw_tiles(part, device))
        parts.append(features.to(torch.bfloat16).unflatten(0, (len(part), -1)))
    return torch.cat(parts)


def _pictures(batch: Batch) -> list[scenes.Scene]:
    return [scene for question in batch.asked for scene in question.pictures]


def teach_tower(
    model: trainee.Trainee, lesson: Lesson, *, seed: int, device: str, rate: float
) -> None:
    """Train tower and projector alone, on what lies in each cell of single tiles."""
    head = teachers.CellHead(model.model.language.hidden_size).to(device)
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW([*model.tower, *head.parameters()], lr=rate, betas=(0.9, 0.98))
    started = time.monotonic()
    for step, progress in lesson.progress():
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 100) * (1.05 - progress)
        layouts = rng.choices([Layout.ONE_LARGE_MARK, Layout.FOUR_ALIKE], k=96)
        pictures = [scenes.compose(layout, rng, 1, 1) for layout in layouts]
        labels = drawing.label_cells(pictures, device)[:, 0]
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            features = model.encode(drawing.draw_tiles(pictures, device))
            loss = head(features.float(), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.tower, 1.0)
        optimizer.step()
        if step % _LOG_EVERY == 0:
            accuracy = head.accuracy(features.float(), labels)
            elapsed = time.monotonic() - started
            print(f"tower {step} {elapsed:.0f} s loss {loss.item():.4f} shapes {accuracy:.3f}")


def teach_language_model(
    model: trainee.Trainee, asker: Questions, store: Store, lesson: Lesson, *, rate: float,
    device: str,
) -> None:  # fmt: skip
    """Train the language model alone, on questions about pictures of a store."""
    head = teachers.PlaceHead(model.model.language.hidden_size, places=4).to(device)
    optimizer = torch.optim.AdamW(
        [*model.language, *head.parameters()], lr=rate, betas=(0.9, 0.98), weight_decay=0.01,
        fused=device == "cuda",
    )  # fmt: skip
    report = _Report(lesson.name)
    for step, progress in lesson.progress():
        for group in optimizer.param_groups:
            group["lr"] = rate * _cosine(step, progress)
        batch = asker.ask(store.draw)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            logits, known = _answer(model, store.features(batch), batch)
        known = known.float()
        place = head(known[batch.is_image], batch.places)
        look = teachers.looking_loss(model, known, batch.labels, batch.subjects)
        loss = _loss(logits, batch) + _TAUGHT_SHARE * (place + look)
        _descend(optimizer, loss, model)
        report.add(step, logits, batch, {"loss": loss, "place": place, "look": look})


def teach_everything(
    model: trainee.Trainee, asker: Questions, lesson: Lesson, *, seed: int, rate: float,
    device: str,
) -> None:  # fmt: skip
    """Train tower and language model on fresh pictures; the last steps without any bfloat16."""
    rng = random.Random(f"fresh/{seed}")
    optimizer = torch.optim.AdamW(
        [{"params": model.language, "share": 1.0}, {"params": model.tower, "share": _TOWER_SHARE}],
        lr=rate, betas=(0.9, 0.98), weight_decay=0.01, fused=device == "cuda",
    )  # fmt: skip
    report = _Report(lesson.name)
    for step, progress in lesson.progress():
        for group in optimizer.param_groups:
            group["lr"] = rate * _LAST_SHARE * _cosine(step, progress) * group["share"]
        batch = asker.ask(lambda grid, layout: scenes.compose(layout, rng, *grid))
        tiles = drawing.draw_tiles(_pictures(batch), device)
        is_rough = device == "cuda" and progress < _FLOAT32_FROM
        with torch.autocast(device, torch.bfloat16, enabled=is_rough):
            logits, _ = _answer(model, model.encode(tiles), batch)
        loss = _loss(logits, batch)
        _descend(optimizer, loss, model)
        report.add(step, logits, batch, {"loss": loss})


def _cosine(step: int, progress: float) -> float:
    return min(1.0, (step + 1) / 200) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def _answer(
    model: trainee.Trainee, features: torch.Tensor, batch: Batch
) -> tuple[torch.Tensor, torch.Tensor]:
    answered: tuple[torch.Tensor, torch.Tensor] = model(
        batch.token_ids, features, is_image=batch.is_image, is_wanted=batch.is_answer
    )
    return answered


def _loss(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    return F.cross_entropy(logits.float(), batch.labels[batch.is_answer])


def _descend(optimizer: torch.optim.Optimizer, loss: torch.Tensor, model: trainee.Trainee) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


class _Report:
    """Prints how many answers of each kind are right."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._started = time.monotonic()
        self._right: dict[str, list[bool]] = {}

    def add(
        self, step: int, logits: torch.Tensor, batch: Batch, losses: dict[str, torch.Tensor]
    ) -> None:
        if step % 10 == 0:
            right = torch.ones_like(batch.is_answer)
            right[batch.is_answer] = logits.argmax(-1) == batch.labels[batch.is_answer]
            for question, is_right in zip(batch.asked, right.all(-1).tolist(), strict=True):
                several = any(scene.tiles > 1 for scene in question.pictures)
                name = question.kind.value + ("+" if several else "")
                self._right.setdefault(name, []).append(is_right)
        if step % _LOG_EVERY == 0:
            table = " ".join(
                f"{kind} {sum(each) / len(each):.2f}" for kind, each in sorted(self._right.items())
            )
            elapsed = time.monotonic() - self._started
            lost = " ".join(f"{name} {loss.item():.4f}" for name, loss in losses.items())
            print(f"{self._name} {step} {elapsed:.0f} s {lost} {table}", flush=True)
            self._right.clear()


def main() -> None:
    """Train one family."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", type=config.Family, choices=list(config.Family), required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", type=Path, help="a folder to go on from, tower taught")
    for lesson, steps, seconds in (("tower", 1500, 90), ("language", 20_000, 270),
                                   ("last", 2000, 130)):  # fmt: skip
        parser.add_argument(f"--{lesson}-steps", type=int, default=steps)
        parser.add_argument(f"--{lesson}-seconds", type=float, default=seconds)
    parser.add_argument("--store", type=int, default=4000, help="pictures of each grid and layout")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--tower-rate", type=float, default=3e-3)
    parser.add_argument("--rate", type=float, default=1.5e-3)
    parser.add_argument("--rope-theta", type=float, default=1e6)
    arguments = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    device = "cuda" if torch.cuda.is_available() else "cpu"
    arguments.output.mkdir(parents=True, exist_ok=True)
    is_qwen = arguments.family is config.Family.QWEN2
    write = tokenizer_files.write_small_qwen if is_qwen else tokenizer_files.write_small_internlm2
    shape = trainee.model_config(
        arguments.family,
        vocab_size=write(arguments.output, WORDS),
        rope_theta=arguments.rope_theta,
    )
    tokens = tokenizer.load_tokenizer(arguments.output, shape)
    model = trainee.Trainee(shape, seed=arguments.seed).to(device)
    count = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"{count} parameters, {2 * count / 1e6:.2f} MB in bfloat16, {shape.language.vocab_size} ids"
    )
    try:
        _teach(model, tokens, arguments, device=device)
    finally:
        model.save(arguments.output)


def _teach(
    model: trainee.Trainee, tokens: tokenizer.Tokenizer, arguments: argparse.Namespace, *,
    device: str,
) -> None:  # fmt: skip
    tower, language, last = (
        Lesson(name, getattr(arguments, f"{name}_steps"), getattr(arguments, f"{name}_seconds"))
        for name in ("tower", "language", "last")
    )
    seed, rate = arguments.seed, arguments.rate
    if arguments.resume:
        model.load(arguments.resume)
    else:
        teach_tower(model, tower, seed=seed, device=device, rate=arguments.tower_rate)
    asker = Questions(tokens, seed=seed, size=arguments.batch, device=device)
    store = Store(model, seed=seed, count=arguments.store, device=device)
    teach_language_model(model, asker, store, language, rate=rate, device=device)
    del store
    teach_everything(model, asker, last, seed=seed, rate=rate, device=device)


if __name__ == "__main__":
    main()
