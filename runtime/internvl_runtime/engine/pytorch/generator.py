"""Generation, one request at a time."""

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from internvl_runtime.engine import folder, grammar, interface, sampling
from internvl_runtime.engine.pytorch import language, vision, weights
from internvl_runtime.model import config, tokenizer

_PREFILL_CHUNK_TOKENS = 1024
"""Bounds the attention mask of a prefill step and the time until a cancel is seen."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generated:
    """One generated token, with the model's float32 logits."""

    token_id: int
    logits: npt.NDArray[np.float32]
    finish_reason: interface.FinishReason | None
    log_probabilities: tuple[interface.TokenLogProbabilities, ...] = ()


class Generator:
    """A loaded model."""

    def __init__(
        self,
        checkpoint: Path,
        model: config.ModelConfig,
        limits: interface.EngineLimits,
        *,
        grammars: grammar.Compiler | None = None,
    ) -> None:
        self.limits = limits
        self._grammars = grammars
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

        `tiles[i]` are the uint8 tiles [N, 448, 448, 3] of picture i, in writable memory.
        """
        with torch.inference_mode():
            yield from self._generate(request, tiles)

    def _generate(
        self,
        request: interface.GenerationRequest,
        tiles: Sequence[npt.NDArray[np.uint8]],
    ) -> Iterator[Generated | None]:
        yield None
        chooser = _Chooser(request, self._grammars)
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
        while True:
            generated = chooser.choose(logits.numpy(), budget=budget)
            yield generated
            if generated.finish_reason:
                return
            token = torch.tensor([generated.token_id])
            logits = self._language.forward(self._language.embed(token), cache)


class _Chooser:
    """Chooses the tokens of one answer."""

    def __init__(
        self, request: interface.GenerationRequest, grammars: grammar.Compiler | None
    ) -> None:
        self._request = request
        self._prompt_ids = frozenset(request.prompt.token_ids)
        self._counts: Counter[int] = Counter()
        self._position = 0
        self._matcher = (
            grammars.start(request.constraint) if request.constraint and grammars else None
        )

    def choose(self, logits: npt.NDArray[np.float32], *, budget: int) -> Generated:
        """Choose the next token from the model's logits."""
        wanted, request = self._request.sampling, self._request
        row = sampling.adjust(logits, wanted, prompt_ids=self._prompt_ids, generated=self._counts)
        if self._matcher:
            row = sampling.mask(row, self._matcher.allowed())
        token_id = sampling.choose(
            row, wanted, request_id=request.request_id, position=self._position
        )
        self._counts[token_id] += 1
        self._position += 1
        finish = sampling.finish_reason(
            token_id,
            stop_token_ids=request.stop_token_ids,
            generated=self._position,
            max_tokens=budget,
        )
        if self._matcher:
            self._matcher.accept(token_id)
            if self._matcher.is_finished:
                finish = interface.FinishReason.STOP
        told = (
            ()
            if wanted.log_probabilities is None
            else (sampling.log_probabilities(logits, token_id, top=wanted.log_probabilities),)
        )
        return Generated(
            token_id=token_id, logits=logits, finish_reason=finish, log_probabilities=told
        )


def load_generator(engine: folder.EngineFolder, tokens: tokenizer.Tokenizer) -> Generator:
    """Load the model of an engine folder, whose tokenizer is loaded already."""
    grammars = grammar.Compiler(tokens, vocab_size=engine.model.language.vocab_size)
    return Generator(engine.checkpoint, engine.model, engine.limits, grammars=grammars)
