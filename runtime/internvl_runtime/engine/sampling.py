"""Choosing the next token: pure functions over one row of float32 logits [vocabulary].

They define what the samplers of engines compute, and are what those are
tested against. A row goes through penalties and bias, the grammar's mask, temperature, top_k,
top_p and min_p, in this order.
"""

import hashlib
from collections.abc import Collection, Mapping

import numpy as np
import numpy.typing as npt

from internvl_runtime.engine import interface

Row = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]


def choose(logits: Row, sampling: interface.Sampling, *, request_id: str, position: int) -> int:
    """Choose a token id from logits that were adjusted and masked.

    With a seed the choice depends on the seed, the answer's index and the
    position in the answer alone, so that a request can be repeated.
    """
    if sampling.is_greedy:
        return int(np.argmax(logits))
    probabilities = probabilities_of(logits, sampling)
    number = uniform(origin_of(sampling, request_id), position)
    return int(np.searchsorted(np.cumsum(probabilities), number, side="right"))


def origin_of(sampling: interface.Sampling, request_id: str) -> str:
    """Return what an answer's random numbers come from: its seed, else its own name."""
    return request_id if sampling.seed is None else f"{sampling.seed}/{sampling.answer_index}"


def adjust(
    logits: Row,
    sampling: interface.Sampling,
    *,
    prompt_ids: Collection[int],
    generated: Mapping[int, int],
) -> Row:
    """Apply penalties and bias; returns the row itself where there are none.

    `generated` counts the answer's tokens so far. The repetition penalty
    divides positive logits and multiplies negative ones, for tokens of prompt
    and answer (https://arxiv.org/abs/1909.05858); the others follow OpenAI's
    formula: logit - presence - frequency * count.
    """
    if not is_adjusted(sampling):
        return logits
    row = logits.copy()
    if sampling.repetition_penalty != 1.0:
        seen = np.fromiter({*prompt_ids, *generated}, np.int64)
        values = row[seen]
        penalty = np.float32(sampling.repetition_penalty)
        row[seen] = np.where(values > 0, values / penalty, values * penalty)
    if generated:
        ids = np.fromiter(generated, np.int64)
        counts = np.fromiter(generated.values(), np.float32)
        row[ids] -= np.float32(sampling.presence_penalty)
        row[ids] -= np.float32(sampling.frequency_penalty) * counts
    for token_id, bias in sampling.logit_bias:
        row[token_id] += np.float32(bias)
    return row


def is_adjusted(sampling: interface.Sampling) -> bool:
    """Whether penalties or bias change a row."""
    return counts_tokens(sampling) or bool(sampling.logit_bias)


def counts_tokens(sampling: interface.Sampling) -> bool:
    """Whether what was said before changes a row."""
    return bool(
        sampling.repetition_penalty != 1.0
        or sampling.presence_penalty
        or sampling.frequency_penalty
    )


def mask(logits: Row, allowed: Mask) -> Row:
    """Take out what a grammar does not allow."""
    masked: Row = np.where(allowed, logits, np.float32(-np.inf))
    return masked


def probabilities_of(logits: Row, sampling: interface.Sampling) -> npt.NDArray[np.float64]:
    """Return the distribution that is sampled; it sums to one or a little more."""
    scaled = logits.astype(np.float64) / sampling.temperature
    exponentials: npt.NDArray[np.float64] = np.exp(scaled - scaled.max())
    probabilities: npt.NDArray[np.float64] = exponentials / exponentials.sum()
    if 0 < sampling.top_k < len(probabilities):
        order = np.argsort(-probabilities, kind="stable")
        probabilities[order[sampling.top_k :]] = 0.0
        probabilities /= probabilities.sum()
    if sampling.top_p < 1.0:
        order = np.argsort(-probabilities, kind="stable")
        before = np.cumsum(probabilities[order]) - probabilities[order]
        probabilities[order[before >= sampling.top_p]] = 0.0
        probabilities /= probabilities.sum()
    if sampling.min_p > 0.0:
        probabilities[probabilities < sampling.min_p * probabilities.max()] = 0.0
        probabilities /= probabilities.sum()
    # The last non-zero entry absorbs rounding, so that the sum is never below one.
    probabilities[np.flatnonzero(probabilities)[-1]] += 1.0 - probabilities.sum() + 1e-12
    return probabilities


def log_probabilities(logits: Row, token_id: int, *, top: int) -> interface.TokenLogProbabilities:
    """Tell how likely a token was in the model's own row, and which were the likeliest."""
    wide = logits.astype(np.float64)
    shifted = wide - wide.max()
    every = shifted - np.log(np.exp(shifted).sum())
    best = np.argsort(-every, kind="stable")[:top]
    return interface.TokenLogProbabilities(
        chosen=float(every[token_id]), top=tuple((int(i), float(every[i])) for i in best)
    )


def finish_reason(
    token_id: int, *, stop_token_ids: Collection[int], generated: int, max_tokens: int
) -> interface.FinishReason | None:
    """Tell whether a token is the answer's last; `generated` counts it in."""
    if token_id in stop_token_ids:
        return interface.FinishReason.STOP
    return interface.FinishReason.LENGTH if generated >= max_tokens else None


def uniform(origin: str, position: int) -> float:
    """Return a number in [0, 1) that depends on its arguments alone."""
    digest = hashlib.blake2b(f"{origin}/{position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53
