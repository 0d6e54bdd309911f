"""Holds an engine's answers against the published weights' own, before it is published."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from internvl_runtime import errors
from internvl_runtime.artifacts import progress, reference
from internvl_runtime.engine import verification
from internvl_runtime.model import config

_FACTOR = 4.0
"""How much further than the reference's own rounding an engine may be: it sums in another order."""
_LEAST_DEVIATION = 2e-3
"""Natural logarithms that float32 itself may differ by."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Differences from the published weights in float32."""

    name: str
    deviation: float
    """Largest of the engine's."""
    rounding: float
    """Largest of the reference's own in the engine's encoding."""

    @property
    def allowed(self) -> float:
        """Return what the engine may deviate by."""
        return _FACTOR * self.rounding + _LEAST_DEVIATION


def compare(
    answers: Sequence[verification.Answered],
    folder: Path,
    model: config.ModelConfig,
    *,
    lane: reference.Lane,
    device: str,
    report: progress.Report,
) -> list[Comparison]:
    """Compare answers with a forward pass over the published files in `folder`.

    `lane` is the engine's encoding. Raises StageError (VerificationFailed) where its rounding does
    not explain a difference.
    """
    computed = reference.compute(
        folder,
        model,
        [_asked(answered) for answered in answers],
        lanes=list(dict.fromkeys([reference.EXACT, lane])),
        device=torch.device(device),
        report=report,
    )
    compared = [
        comparison
        for answered, lanes in zip(answers, computed, strict=True)
        for comparison in _compare(answered, lanes[0], lanes[-1])
    ]
    for each in compared:
        if not each.deviation <= each.allowed:
            raise errors.StageError(
                errors.Reason.VERIFICATION_FAILED,
                f"the {each.name} are up to {each.deviation:.3g} from those of the published "
                f"weights; rounding explains {each.allowed:.3g}",
                remedy="remove the checkpoint from the cache (internvl-runtime cache) and convert "
                "again; if it stays so, the builder's GPU or libraries compute wrong results",
            )
    return compared


def _compare(
    answered: verification.Answered, exact: reference.Computed, rounded: reference.Computed
) -> Iterator[Comparison]:
    if answered.features is not None:
        yield Comparison(
            f"features of the {answered.name} prompt",
            _largest(answered.features - exact.features),
            _largest(rounded.features - exact.features),
        )
    logits, in_lane = exact.logits.log_softmax(-1), rounded.logits.log_softmax(-1)
    deviation = rounding = 0.0
    for step, told in enumerate(answered.told):
        token_ids, values = zip(*told.top, strict=True)
        own = logits[step, list(token_ids)]
        # A token that the reference thinks likely must be among those that the engine names.
        missed = float(logits[step].max() - own.max())
        deviation = max(deviation, _largest(torch.tensor(values) - own), missed)
        rounding = max(rounding, _largest(in_lane[step, list(token_ids)] - own))
    yield Comparison(f"log-probabilities of the {answered.name} prompt", deviation, rounding)


def _largest(differences: torch.Tensor) -> float:
    return round(float(differences.abs().max()), 6)


def _asked(answered: verification.Answered) -> reference.Asked:
    prompt = answered.request.prompt
    places = [
        position
        for each in prompt.placements
        for position in range(each.offset, each.offset + each.length)
    ]
    (drawn,) = verification.DRAWN.values()
    return reference.Asked(
        token_ids=[*prompt.token_ids, *answered.token_ids[:-1]],
        picture_tokens=places,
        tiles=drawn if places else np.empty((0, *drawn.shape[1:]), np.uint8),
        last=len(answered.token_ids),
    )
