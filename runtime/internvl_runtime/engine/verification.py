"""Recorded answers: a build writes them, and a server repeats them before it is ready."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from internvl_runtime import errors
from internvl_runtime.engine import interface, stepping
from internvl_runtime.model import config, conversation, prompt, tokenizer
from internvl_runtime.vision import grid

_TOKENS = 8
_TOP = 20
"""Log-probabilities of each token that are compared with the published weights' own."""
_QUESTION = "Describe the picture."
_TOLERANCES = {"float32": 1e-3, "bfloat16": 0.25, "float16": 0.05}
"""Top-2 margins below which another machine may choose the other token: a few
units in the last place of logits of magnitude 10 in each dtype."""


@dataclasses.dataclass(frozen=True)
class Answered:
    """One greedy answer, and what the engine thought at each of its tokens."""

    request: stepping.Submitted
    token_ids: list[int]
    told: list[interface.TokenLogProbabilities]
    """For each token."""
    features: torch.Tensor | None
    """float32 [image tokens, hidden size of the language model] of the prompt's picture."""

    @property
    def name(self) -> str:
        """Of the prompt."""
        return self.request.request_id

    def record(self) -> "Recorded":
        """Return what a server compares its own answer with."""
        margins = [round(each.top[0][1] - each.top[1][1], 6) for each in self.told]
        return Recorded(name=self.name, token_ids=self.token_ids, margins=margins)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recorded:
    """One greedy answer."""

    name: str
    token_ids: list[int]
    margins: list[float]
    """Difference of the two largest logits at each step."""


def _draw() -> npt.NDArray[np.uint8]:
    """Return two tiles side by side and their thumbnail."""
    size = config.TILE_SIZE
    x, y = np.meshgrid(np.arange(2 * size), np.arange(size))
    drawn = np.stack([(7 * x + 3 * y) % 256, (5 * x + 11 * y) % 256, (x ^ y) % 256], axis=-1)
    left, right, thumbnail = drawn[:, :size], drawn[:, size:], drawn[:, ::2]
    return np.stack([left, right, thumbnail]).astype(np.uint8)


DRAWN = {"verification": _draw()}
"""The picture's tiles [3, 448, 448, 3] by its content hash."""


def check_limits(
    limits: interface.EngineLimits, model: config.ModelConfig, tokens: tokenizer.Tokenizer
) -> None:
    """Raise StageError where an engine of such limits could not answer the prompts."""
    for request in requests(model, tokens):
        length = len(request.prompt.token_ids)
        room = min(limits.max_input_tokens, limits.max_sequence_tokens - _TOKENS)
        if length > room:
            raise errors.StageError(
                errors.Reason.INVALID_SPEC,
                f"the {request.request_id} prompt that every engine is verified with has {length} "
                f"tokens, this one would take {room}",
                remedy="raise spec.engine.maxSequenceTokens to 1024 or more, and maxInputTokens "
                "to 1000 or more where it is set",
            )


def answer(
    engine: stepping.Engine, model: config.ModelConfig, tokens: tokenizer.Tokenizer
) -> list[Answered]:
    """Answer an image prompt and a text prompt, greedily.

    Raises StageError when a logit is not finite.
    """
    return [_answer(engine, request) for request in requests(model, tokens)]


def check(answers: list[Answered], recorded: list[dict[str, Any]], *, dtype: str) -> None:
    """Compare answers with the recorded ones; raises StageError at the first other token.

    A step whose recorded margin is below the dtype's tolerance ends the comparison.
    """
    for now, raw in zip(answers, recorded, strict=True):
        before = Recorded(**raw)
        for step, (a, b) in enumerate(zip(now.token_ids, before.token_ids, strict=True)):
            if before.margins[step] < _TOLERANCES[dtype]:
                break
            if a != b:
                raise errors.StageError(
                    errors.Reason.VERIFICATION_FAILED,
                    f"the {now.name} prompt gives token {a} at step {step}, the build recorded {b}",
                    remedy="the checkpoint or the hardware is damaged: serve on another node, or "
                    "remove the engine and its checkpoint from the cache and build again",
                )


def _answer(engine: stepping.Engine, request: stepping.Submitted) -> Answered:
    try:
        steps = list(stepping.answer(engine, request, DRAWN))
    except (errors.RequestError, errors.EngineUnavailableError) as e:
        raise errors.StageError(
            errors.Reason.VERIFICATION_FAILED,
            f"the {request.request_id} prompt is not answered: {e}",
            remedy="an engine takes a picture of 3 tiles and 1,024 tokens at least: raise "
            "maxTilesPerRequest and maxSequenceTokens where they are lower; else read the log",
        ) from e
    told = [each for step in steps for each in step.log_probabilities]
    if not all(math.isfinite(each.chosen) for each in told):
        raise errors.StageError(
            errors.Reason.VERIFICATION_FAILED,
            f"the {request.request_id} prompt gives logits that are not finite",
            remedy="use another engine.dtype, and check that the weights are whole",
        )
    token_ids = [token_id for step in steps for token_id in step.token_ids]
    features = None
    if request.prompt.placements:
        (content_hash,) = request.content_hashes
        features = engine.pictures.features(content_hash).float().cpu()
    return Answered(request, token_ids, told, features)


def requests(
    model: config.ModelConfig, tokens: tokenizer.Tokenizer
) -> Iterator[stepping.Submitted]:
    """Yield the prompts: one with a picture, one without."""
    for name, parts in (("image", (conversation.Image(0), _QUESTION)), ("text", (_QUESTION,))):
        turns = conversation.place_images([conversation.Turn(conversation.Role.USER, parts)])
        segments = conversation.render(turns, system_message=model.system_message)
        sampling = interface.Sampling(max_tokens=_TOKENS, temperature=0.0, log_probabilities=_TOP)
        yield stepping.Submitted(
            request_id=name,
            prompt=prompt.expand(segments, tiles=[grid.Grid(2, 1).tiles], tokens=tokens),
            content_hashes=list(DRAWN),
            sampling=sampling,
            stop_token_ids=frozenset(),
        )
