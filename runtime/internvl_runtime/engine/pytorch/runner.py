"""Runs planned steps on a device: tower, language model, choice of tokens."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch

from internvl_runtime.engine import gallery, transfer
from internvl_runtime.engine.pytorch import (
    attention,
    following,
    language,
    sampler,
    scheduler,
    vision,
)
from internvl_runtime.model import config


@dataclasses.dataclass(frozen=True)
class Launched:
    """A step that was given to the device, and may not be over."""

    chunks: tuple[scheduler.Chunk, ...]
    """Those that choose a token, one for each of `rows`."""
    rows: tuple[sampler.Row, ...]
    chosen: sampler.Chosen
    """On the host, once the step is over."""
    over: torch.cuda.Event | None = None

    def wait(self) -> None:
        """Wait until the step is over."""
        if self.over:
            self.over.synchronize()


@dataclasses.dataclass(frozen=True)
class _Newest:
    """Tokens that the last step chose, on the device, where the host may not know them yet."""

    token_ids: torch.Tensor
    rows: Mapping[str, int]
    """By request."""


class Runner:
    """A model on a device, with its cache."""

    def __init__(
        self,
        tower: vision.VisionTower,
        model: language.LanguageModel,
        attend: attention.Attention,
        *,
        tiles_per_pass: int,
        leader: following.Leader | None = None,
    ) -> None:
        """Take what rank 0 has; `leader` tells the other ranks."""
        self.model = model
        self._leader = leader
        self.most_tiles_per_pass = self.tiles_per_pass = tiles_per_pass
        self.tower_passes = 0
        self.tiles_encoded = 0
        self._tower = tower
        self._attend = attend
        self._newest = _Newest(torch.empty(0, dtype=torch.long), {})

    @property
    def feature_bytes_per_tile(self) -> int:
        """Bytes of a tile's features."""
        hidden = self.model.language.hidden_size
        return config.TOKENS_PER_TILE * hidden * self.model.dtype.itemsize

    @torch.inference_mode()
    def encode(self, pictures: Mapping[str, gallery.Tiles]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the features [tokens, hidden] of pictures, whose tiles share passes."""
        every = [
            tiles for picture in pictures.values() for tiles in np.split(picture, len(picture))
        ]
        parts = []
        for start in range(0, len(every), self.tiles_per_pass):
            batch = np.concatenate(every[start : start + self.tiles_per_pass])
            self.tower_passes += 1
            self.tiles_encoded += len(batch)
            parts.append(self._tower.encode(self._on_device(torch.from_numpy(batch))))
        counts = [len(picture) for picture in pictures.values()]
        features = torch.cat(parts).split(counts)
        for content_hash, own in zip(pictures, features, strict=True):
            yield content_hash, own.flatten(0, 1).clone()

    @torch.inference_mode()
    def launch(
        self,
        step: scheduler.Step,
        rows: Sequence[sampler.Row],
        features: gallery.Gallery,
    ) -> Launched:
        """Compute a step; `rows` are those of the chunks that choose a token, in order."""
        hidden = self._embed(step, features)
        positions = torch.cat([torch.arange(c.start, c.end) for c in step.chunks])
        ends = np.cumsum([chunk.length for chunk in step.chunks]) - 1
        last = [int(end) for end, c in zip(ends, step.chunks, strict=True) if c.chooses]
        spans = attention.spans_of(step)
        leader = self._leader
        with leader.step(spans, hidden, last) if leader else contextlib.nullcontext():
            self._attend.begin(spans)
            logits = self.model.forward(
                hidden,
                self._on_device(positions),
                self._on_device(torch.tensor(last, dtype=torch.long)),
                self._attend,
            )
        chunks = tuple(chunk for chunk in step.chunks if chunk.chooses)
        chosen = sampler.choose(logits, rows)
        names = {chunk.sequence.request_id: row for row, chunk in enumerate(chunks)}
        self._newest = _Newest(chosen.token_ids, names)
        fetched = sampler.fetch(chosen)
        return Launched(chunks, tuple(rows), fetched, transfer.mark(self.model.device))

    def _embed(self, step: scheduler.Step, features: gallery.Gallery) -> torch.Tensor:
        """Return [T, hidden]: tokens' embeddings, and pictures' features at their places."""
        hidden = self.model.embed(self._token_ids(step))
        start = 0
        for chunk in step.chunks:
            _place_features(hidden[start : start + chunk.length], chunk, features)
            start += chunk.length
        return hidden

    def _token_ids(self, step: scheduler.Step) -> torch.Tensor:
        known = [self._known_ids(chunk) for chunk in step.chunks]
        token_ids = self._on_device(torch.tensor([i for ids in known for i in ids]))
        ends = np.cumsum([len(ids) for ids in known]) - 1
        unknown = [
            (int(end), self._newest.rows[chunk.sequence.request_id])
            for end, chunk in zip(ends, step.chunks, strict=True)
            if chunk.end > len(chunk.sequence.token_ids)
        ]
        if unknown:
            places, rows = self._on_device(torch.tensor(unknown)).unbind(1)
            token_ids[places] = self._newest.token_ids[rows]
        return token_ids

    def _known_ids(self, chunk: scheduler.Chunk) -> list[int]:
        """Return the chunk's token ids, and 0 for one that is not known yet."""
        ids = chunk.sequence.token_ids[chunk.start : chunk.end]
        return ids + [0] * (chunk.length - len(ids))

    def _on_device(self, tensor: torch.Tensor) -> torch.Tensor:
        return transfer.upload(tensor, self.model.device)


def _place_features(
    hidden: torch.Tensor, chunk: scheduler.Chunk, features: gallery.Gallery
) -> None:
    """Write the features of pictures that lie in a chunk over its embeddings."""
    for placement, content_hash in chunk.sequence.pictures:
        start = max(chunk.start, placement.offset)
        end = min(chunk.end, placement.offset + placement.length)
        if start < end:
            own = features.features(content_hash)
            hidden[start - chunk.start : end - chunk.start] = own[
                start - placement.offset : end - placement.offset
            ]
