"""Requests in the executor's words: everything that it would refuse is refused here, by name.

Pictures are rows of a prompt table: in the prompt, ids from the vocabulary's size
upwards stand for them, sequentially over all tiles of all pictures.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from internvl_runtime import errors
from internvl_runtime.engine import interface, sampling, stepping
from internvl_runtime.engine.tensorrt import built as builts

_MOST_TOP_K = 1024
"""The executor would cut a larger one silently (`cpp/tensorrt_llm/layers/topKSamplingLayer.cu`)."""


def check(request: stepping.Submitted, built: builts.Built) -> None:
    """Raise RequestError where a request is beyond what the engine was built for."""
    token_ids = request.prompt.token_ids
    rows = sum(placement.length for placement in request.prompt.placements)
    _check_limit("prompt tokens", len(token_ids), built.max_input_tokens)
    _check_limit("image tokens", rows, built.rows_per_request)
    if request.sampling.top_k > _MOST_TOP_K:
        raise errors.RequestError(
            f"top_k is {request.sampling.top_k}; this engine takes at most {_MOST_TOP_K}",
            parameter="top_k",
        )
    # A text token there would be taken for a row of the table.
    beyond = next((each for each in token_ids if each >= built.vocab_size), None)
    if beyond is not None:
        raise errors.RequestError(
            f"token id {beyond} is not below {built.vocab_size}, the size of the vocabulary",
            parameter="prompt",
            code="invalid_token",
        )


def _check_limit(what: str, given: int, limit: int) -> None:
    if given > limit:
        raise errors.RequestError(
            f"{given} {what}, the engine was built for {limit}: send a shorter prompt or fewer "
            "and smaller pictures",
            parameter="messages",
            code="context_length_exceeded",
        )


def create(
    executor: Any,
    request: stepping.Submitted,
    features: Mapping[str, torch.Tensor],
    built: builts.Built,
    *,
    tells_logits: bool = False,
) -> Any:
    """Return an executor's request; `features` are [tokens, hidden] by content hash.

    With `tells_logits` the answer comes at once, with the logits of each of its tokens.
    """
    return executor.Request(
        input_token_ids=_with_rows(request, built.vocab_size),
        max_tokens=max_tokens(request, built),
        streaming=not tells_logits,
        sampling_config=executor.SamplingConfig(
            **sampling_of(request.sampling, request.request_id)
        ),
        output_config=executor.OutputConfig(
            return_log_probs=request.sampling.log_probabilities is not None,
            return_generation_logits=tells_logits,
            exclude_input_from_output=True,
            return_perf_metrics=True,
        ),
        # An end id is left out of the answer, and has no log-probability; a stop word is not.
        stop_words=[[each] for each in sorted(request.stop_token_ids)] or None,
        prompt_tuning_config=_prompt_table(executor, request, features, built.dtype),
        priority=_priority(request.priority),
    )


def max_tokens(request: stepping.Submitted, built: builts.Built) -> int:
    """Return how long the answer may be: the executor would cut it with a warning."""
    room = built.max_sequence_tokens - len(request.prompt.token_ids)
    return min(request.sampling.max_tokens, room)


def _with_rows(request: stepping.Submitted, vocab_size: int) -> list[int]:
    """Return the prompt with ids of table rows where pictures are."""
    token_ids, row = list(request.prompt.token_ids), vocab_size
    for placement in request.prompt.placements:
        end = placement.offset + placement.length
        token_ids[placement.offset : end] = range(row, row + placement.length)
        row += placement.length
    return token_ids


def _prompt_table(
    executor: Any, request: stepping.Submitted, features: Mapping[str, torch.Tensor], dtype: str
) -> Any:
    if not request.prompt.placements:
        return None
    return executor.PromptTuningConfig(
        embedding_table=_table(request, features, dtype),
        input_token_extra_ids=extra_ids(request, len(request.prompt.token_ids)),
    )


def _table(
    request: stepping.Submitted, features: Mapping[str, torch.Tensor], dtype: str
) -> torch.Tensor:
    """Return all rows [tokens, hidden] in the engine's dtype, on the host.

    There the leader can send them to the other ranks; its GPU takes them from pinned memory.
    """
    parts = [
        features[request.content_hashes[placement.index]] for placement in request.prompt.placements
    ]
    table = torch.empty(
        (sum(map(len, parts)), parts[0].shape[1]),
        dtype=getattr(torch, dtype),
        pin_memory=torch.cuda.is_available(),
    )
    return torch.cat(parts, out=table)


def extra_ids(request: stepping.Submitted, length: int) -> list[int]:
    """Return what tells blocks with pictures apart: a picture's hash at its tokens, else 0."""
    ids = [0] * length
    for placement in request.prompt.placements:
        name = request.content_hashes[placement.index]
        end = placement.offset + placement.length
        ids[placement.offset : end] = [_number(name) or 1] * placement.length
    return ids


def sampling_of(wanted: interface.Sampling, request_id: str) -> dict[str, Any]:
    """Return what differs from the most likely token; unset numbers are the executor's own."""
    penalties = {
        name: value
        for name, value, neutral in (
            ("repetition_penalty", wanted.repetition_penalty, 1.0),
            ("presence_penalty", wanted.presence_penalty, 0.0),
            ("frequency_penalty", wanted.frequency_penalty, 0.0),
        )
        if value != neutral
    }
    if wanted.is_greedy:
        return {"beam_width": 1, "top_k": 1, **penalties}
    return {
        "beam_width": 1,
        "temperature": wanted.temperature,
        # Both unset would mean the most likely token.
        "top_k": wanted.top_k,
        "top_p": wanted.top_p,
        "min_p": wanted.min_p or None,
        "seed": _number(sampling.origin_of(wanted, request_id)),
        **penalties,
    }


def _priority(priority: int) -> float:
    """Return a number in (0, 1) that is the higher the earlier a request is to be served."""
    return 0.5 - priority / (2 * (1 + abs(priority)))


def _number(name: str) -> int:
    """Return 64 bits that depend on a name alone."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def finish_reason(executor: Any, reason: Any) -> interface.FinishReason | None:
    """Return why an answer ended, None where it goes on."""
    finished = executor.FinishReason
    return {
        finished.STOP_WORDS: interface.FinishReason.STOP,
        finished.LENGTH: interface.FinishReason.LENGTH,
    }.get(reason)


def told(
    log_probs: Sequence[float], token_ids: Sequence[int]
) -> tuple[interface.TokenLogProbabilities, ...]:
    """Return what the executor tells of its newest tokens: it repeats all the earlier ones."""
    newest = log_probs[len(log_probs) - len(token_ids) :]
    return tuple(interface.TokenLogProbabilities(chosen=each, top=()) for each in newest)


def told_of_logits(
    logits: torch.Tensor, token_ids: Sequence[int], *, top: int, vocab_size: int
) -> tuple[interface.TokenLogProbabilities, ...]:
    """Return the log-probabilities of tokens, and the most likely ones, from [tokens, rows]."""
    every = logits[: len(token_ids), :vocab_size].float().log_softmax(-1)
    best = every.topk(top, dim=-1)
    return tuple(
        interface.TokenLogProbabilities(
            chosen=float(row[token_id]),
            top=tuple(zip(ids.tolist(), values.tolist(), strict=True)),
        )
        for row, token_id, ids, values in zip(
            every, token_ids, best.indices, best.values, strict=True
        )
    )
