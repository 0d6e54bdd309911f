"""Generation, one request at a time."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from internvl_runtime.engine import folder, interface, sampling
from internvl_runtime.engine.pytorch import language, vision, weights
from internvl_runtime.model import config

_PREFILL_CHUNK_TOKENS = 1024
"""Bounds the attention mask of a prefill step and the time until a cancel is seen."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generated:
    """One generated token, with the float32 logits it was chosen from."""

    token_id: int
    logits: npt.NDArray[np.float32]
    finish_reason: interface.FinishReason | None


class Generator:
    """A loaded model."""

    def __init__(
        self, checkpoint: Path, model: config.ModelConfig, limits: interface.EngineLimits
    ) -> None:
        self.limits = limits
        tower = weights.load_weights(checkpoint / "vision.safetensors")
        rank = weights.load_weights(checkpoint / "rank0.safetensors")
        self._vision = vision.VisionTower(model.vision, tower)
        self._language = language.LanguageModel(model.language, rank)

    def generate(
        self,
        request: interface.GenerationRequest,
        tiles: Sequence[npt.NDArray[np.uint8]],
    ) -> Iterator[Generated | None]:
        """Yield the answer token by token, and None after a step that made none.

        `tiles[i]` are the uint8 tiles [N, 448, 448, 3] of picture i.
        """
        with torch.inference_mode():
            yield from self._generate(request, tiles)

    def _generate(
        self,
        request: interface.GenerationRequest,
        tiles: Sequence[npt.NDArray[np.uint8]],
    ) -> Iterator[Generated | None]:
        token_ids = request.prompt.token_ids
        budget = min(request.sampling.max_tokens, self.limits.max_sequence_tokens - len(token_ids))
        cache = language.KeyValueCache(
            self._language.language, capacity=len(token_ids) + budget, dtype=self._language.dtype
        )
        embeddings = self._language.embed(torch.tensor(token_ids))
        for placement in request.prompt.placements:
            features = self._vision.encode(torch.from_numpy(tiles[placement.index]))
            end = placement.offset + placement.length
            embeddings[placement.offset : end] = features.flatten(0, 1)
            yield None
        *leading, last = embeddings.split(
            min(_PREFILL_CHUNK_TOKENS, self.limits.max_batched_tokens)
        )
        for chunk in leading:
            self._language.forward(chunk, cache)
            yield None
        logits = self._language.forward(last, cache)
        for position in range(budget):
            row = logits.numpy()
            token_id = sampling.choose(
                row, request.sampling, request_id=request.request_id, position=position
            )
            finish = _finish_reason(request, token_id, is_last=position + 1 == budget)
            yield Generated(token_id=token_id, logits=row, finish_reason=finish)
            if finish:
                return
            logits = self._language.forward(self._language.embed(torch.tensor([token_id])), cache)


def load_generator(engine: folder.EngineFolder) -> Generator:
    """Load the model of an engine folder."""
    return Generator(engine.checkpoint, engine.model, engine.limits)


def _finish_reason(
    request: interface.GenerationRequest, token_id: int, *, is_last: bool
) -> interface.FinishReason | None:
    if token_id in request.stop_token_ids:
        return interface.FinishReason.STOP
    return interface.FinishReason.LENGTH if is_last else None
