"""Choosing the next tokens of many sequences, on the device that computed the logits.

The formulas are those of `engine.sampling`, row by row; a test holds them
together. Rows that ask for nothing special cost one argmax.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from internvl_runtime.engine import interface, sampling, transfer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seen:
    """Tokens that penalties count, on the device: [vocabulary] each."""

    in_prompt: torch.Tensor
    generated: torch.Tensor
    """How often each token was chosen; the sampler adds what it chooses."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """What one row of logits is to be treated with."""

    sampling: interface.Sampling
    origin: str
    """Where random numbers come from, see `sampling.origin_of`."""
    position: int
    """The number of the token, from 0 at the answer's beginning."""
    seen: Seen | None = None
    allowed: npt.NDArray[np.bool_] | None = None
    """Tokens that a grammar allows."""


@dataclasses.dataclass(frozen=True)
class Chosen:
    """Token ids [rows], and log-probabilities of the rows that want them."""

    token_ids: torch.Tensor
    told_rows: tuple[int, ...] = ()
    told: tuple[torch.Tensor, ...] = ()
    """Of these rows: the chosen token's [K], the best ids [K, most] and theirs [K, most]."""


def watch(prompt_ids: Sequence[int], *, vocab_size: int, device: torch.device) -> Seen:
    """Return the counts of an answer that has not begun."""
    in_prompt = torch.zeros(vocab_size, dtype=torch.bool)
    in_prompt[torch.tensor(prompt_ids)] = True
    return Seen(
        in_prompt=transfer.upload(in_prompt, device),
        generated=torch.zeros(vocab_size, dtype=torch.float32, device=device),
    )


def choose(logits: torch.Tensor, rows: Sequence[Row]) -> Chosen:
    """Choose a token for each row of float32 logits [rows, vocabulary]."""
    adjusted = _mask(_adjust(logits, rows), rows)
    token_ids = adjusted.argmax(-1)
    drawn = [number for number, row in enumerate(rows) if not row.sampling.is_greedy]
    if drawn:
        index = _index(drawn, logits)
        token_ids[index] = _draw(adjusted[index], [rows[number] for number in drawn])
    told_rows = tuple(
        number for number, row in enumerate(rows) if row.sampling.log_probabilities is not None
    )
    told = _tell(logits, token_ids, rows, told_rows)
    # Last, so that a step which memory is too short for has counted nothing.
    for number, row in enumerate(rows):
        if row.seen:
            row.seen.generated.index_add_(
                0, token_ids[number : number + 1], torch.ones(1, device=logits.device)
            )
    return Chosen(token_ids, told_rows, told)


def fetch(chosen: Chosen) -> Chosen:
    """Copy to the host, without waiting."""
    told = tuple(transfer.fetch(tensor) for tensor in chosen.told)
    return Chosen(transfer.fetch(chosen.token_ids), chosen.told_rows, told)


def tell(chosen: Chosen, rows: Sequence[Row]) -> dict[int, interface.TokenLogProbabilities]:
    """Return the log-probabilities by row, of what was fetched."""
    if not chosen.told_rows:
        return {}
    own, ids, values = (tensor.tolist() for tensor in chosen.told)
    return {
        row: interface.TokenLogProbabilities(
            chosen=own[place],
            top=tuple(zip(ids[place], values[place], strict=True))[
                : rows[row].sampling.log_probabilities
            ],
        )
        for place, row in enumerate(chosen.told_rows)
    }


def _adjust(logits: torch.Tensor, rows: Sequence[Row]) -> torch.Tensor:
    numbers = [number for number, row in enumerate(rows) if sampling.is_adjusted(row.sampling)]
    if not numbers:
        return logits
    adjusted = logits.clone()
    for number in numbers:
        _adjust_row(adjusted[number], rows[number])
    return adjusted


def _adjust_row(row: torch.Tensor, how: Row) -> None:
    """Apply penalties and bias to one row, in place."""
    wanted = how.sampling
    if how.seen is not None:
        generated = how.seen.generated
        if wanted.repetition_penalty != 1.0:
            penalized = torch.where(
                row > 0, row / wanted.repetition_penalty, row * wanted.repetition_penalty
            )
            row.copy_(torch.where(how.seen.in_prompt | (generated > 0), penalized, row))
        row -= wanted.presence_penalty * (generated > 0)
        row -= wanted.frequency_penalty * generated
    if wanted.logit_bias:
        ids, biases = zip(*wanted.logit_bias, strict=True)
        added = transfer.upload(torch.tensor(biases, dtype=row.dtype), row.device)
        row.index_add_(0, _index(ids, row), added)


def _mask(logits: torch.Tensor, rows: Sequence[Row]) -> torch.Tensor:
    masked = {number: row.allowed for number, row in enumerate(rows) if row.allowed is not None}
    if not masked:
        return logits
    stacked = torch.from_numpy(np.stack(list(masked.values())))
    allowed = transfer.upload(stacked, logits.device)
    index = _index(list(masked), logits)
    return logits.index_copy(0, index, logits[index].masked_fill(~allowed, -torch.inf))


def _draw(logits: torch.Tensor, rows: Sequence[Row]) -> torch.Tensor:
    """Draw from the rows' distributions: [rows]."""
    temperatures = _column([row.sampling.temperature for row in rows], logits)
    probabilities = (logits.to(torch.float64) / temperatures).softmax(-1)
    cut = [number for number, row in enumerate(rows) if row.sampling.is_cut]
    if cut:
        index = _index(cut, logits)
        probabilities[index] = _cut(probabilities[index], [rows[number] for number in cut])
    uniforms = _column([sampling.uniform(row.origin, row.position) for row in rows], logits)
    cumulated = probabilities.cumsum(-1)
    # The last token with a probability takes what rounding leaves over.
    last = (cumulated < cumulated[:, -1:]).sum(-1)
    drawn = torch.searchsorted(cumulated, uniforms, right=True).squeeze(1)
    return torch.minimum(drawn, last)


def _cut(probabilities: torch.Tensor, rows: Sequence[Row]) -> torch.Tensor:
    """Apply top_k, top_p and min_p, each to what the one before left."""
    ordered, ids = probabilities.sort(dim=-1, descending=True, stable=True)
    vocabulary = ordered.shape[-1]
    most = _column([row.sampling.top_k or vocabulary for row in rows], ordered)
    ordered = ordered * (torch.arange(vocabulary, device=ordered.device) < most)
    ordered = ordered / ordered.sum(-1, keepdim=True)
    before = ordered.cumsum(-1) - ordered
    top_p = _column([row.sampling.top_p for row in rows], ordered)
    ordered = ordered * ((before < top_p) | (top_p >= 1))
    ordered = ordered / ordered.sum(-1, keepdim=True)
    min_p = _column([row.sampling.min_p for row in rows], ordered)
    ordered = ordered * (ordered >= min_p * ordered[:, :1])
    ordered = ordered / ordered.sum(-1, keepdim=True)
    return torch.zeros_like(probabilities).scatter(-1, ids, ordered)


def _tell(
    logits: torch.Tensor, token_ids: torch.Tensor, rows: Sequence[Row], told: Sequence[int]
) -> tuple[torch.Tensor, ...]:
    if not told:
        return ()
    index = _index(told, logits)
    every = logits[index].to(torch.float64).log_softmax(-1)
    most = max(rows[number].sampling.log_probabilities or 0 for number in told)
    values, ids = every.sort(dim=-1, descending=True, stable=True)
    own = every.gather(1, token_ids[index].unsqueeze(1)).squeeze(1)
    return own, ids[:, :most], values[:, :most]


def _column(numbers: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    return transfer.upload(torch.tensor(numbers, dtype=torch.float64), like.device).unsqueeze(1)


def _index(numbers: Sequence[int], like: torch.Tensor) -> torch.Tensor:
    return transfer.upload(torch.tensor(numbers), like.device)
