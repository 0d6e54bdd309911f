"""Choosing the next token: pure functions over one row of logits."""

import hashlib

import numpy as np
import numpy.typing as npt

from internvl_runtime.engine import interface

_GREEDY_TEMPERATURE = 1e-5
"""Below this the division overflows; vLLM, too, takes such temperatures for zero."""

Row = npt.NDArray[np.float32]


def choose(logits: Row, sampling: interface.Sampling, *, request_id: str, position: int) -> int:
    """Choose a token id from float32 logits [vocabulary].

    With a seed the choice depends on the seed and the position in the answer
    alone, so that a request can be repeated.
    """
    if sampling.temperature < _GREEDY_TEMPERATURE:
        return int(np.argmax(logits))
    probabilities = probabilities_of(logits, temperature=sampling.temperature, top_p=sampling.top_p)
    origin = request_id if sampling.seed is None else sampling.seed
    return int(np.searchsorted(np.cumsum(probabilities), uniform(origin, position), side="right"))


def probabilities_of(logits: Row, *, temperature: float, top_p: float) -> npt.NDArray[np.float64]:
    """Return the distribution that is sampled: softmax, then the nucleus of `top_p`."""
    scaled = logits.astype(np.float64) / temperature
    exponentials: npt.NDArray[np.float64] = np.exp(scaled - scaled.max())
    probabilities: npt.NDArray[np.float64] = exponentials / exponentials.sum()
    if top_p < 1.0:
        order = np.argsort(-probabilities, kind="stable")
        before = np.cumsum(probabilities[order]) - probabilities[order]
        probabilities[order[before >= top_p]] = 0.0
        probabilities /= probabilities.sum()
    # The last non-zero entry absorbs rounding, so that the sum is never below one.
    probabilities[np.flatnonzero(probabilities)[-1]] += 1.0 - probabilities.sum() + 1e-12
    return probabilities


def uniform(origin: int | str, position: int) -> float:
    """Return a number in [0, 1) that depends on its arguments alone."""
    digest = hashlib.blake2b(f"{origin}/{position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53
