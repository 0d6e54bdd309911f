"""From request fields to what an engine samples with, checked against its limits."""

import json
import math
import re
from typing import Any

from internvl_runtime import errors
from internvl_runtime.engine import interface
from internvl_runtime.server import schemas

Fields = schemas.ChatCompletionRequest | schemas.CompletionRequest

_NEUTRAL: dict[interface.Capability, tuple[object, ...]] = {
    interface.Capability.TOP_K: (None, 0, -1),
    interface.Capability.MIN_P: (None, 0),
    interface.Capability.PRESENCE_PENALTY: (None, 0),
    interface.Capability.FREQUENCY_PENALTY: (None, 0),
    interface.Capability.REPETITION_PENALTY: (None, 1),
    interface.Capability.LOGIT_BIAS: (None, {}),
}
"""Values that need no capability."""
_MOST_SCHEMA_CHARACTERS = 64 * 2**10
_MOST_REPEATS = 1024
_MOST_NESTED_REPEATS = 2**16
_MOST_REPEATS_IN_ALL = 2**14
"""About a second of compiling for each 1,024."""
_MOST_PATTERN_CHARACTERS = 512
_MOST_GROUPS = 16
_COUNTS = re.compile(r"\{(?:\d+,)?(\d{1,9})")
_REPEATS = frozenset({"minItems", "maxItems", "minLength", "maxLength", "minProperties",
                      "maxProperties"})  # fmt: skip


def sampling_of(
    body: Fields, *, max_tokens: int, vocab_size: int, answer_index: int = 0
) -> interface.Sampling:
    """Return how one answer is sampled; raises RequestError for a token id that is none."""
    bias = tuple((int(token_id), value) for token_id, value in (body.logit_bias or {}).items())
    for token_id, _ in bias:
        check_token_id(token_id, vocab_size, parameter="logit_bias")
    return interface.Sampling(
        max_tokens=max_tokens,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=body.top_p or 1.0,
        top_k=max(0, body.top_k or 0),
        min_p=body.min_p or 0.0,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        repetition_penalty=body.repetition_penalty or 1.0,
        logit_bias=bias,
        log_probabilities=_log_probabilities(body),
        seed=body.seed,
        answer_index=answer_index,
    )


def check_capabilities(body: Fields, limits: interface.EngineLimits) -> None:
    """Raise RequestError for a field that the engine does not offer."""
    for capability, neutral in _NEUTRAL.items():
        if getattr(body, capability.value) not in neutral:
            _need(capability, limits)
    if _log_probabilities(body) is not None:
        _need(interface.Capability.LOG_PROBABILITIES, limits)
    if _log_probabilities(body):
        _need(interface.Capability.TOP_LOG_PROBABILITIES, limits)
    if constraint_of(body) is not None:
        _need(interface.Capability.GUIDED_DECODING, limits)


def constraint_of(body: Fields) -> interface.Constraint | None:
    """Return what the answer must look like; raises RequestError for too large a schema."""
    wanted = body.response_format
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object" or wanted.json_schema is None:
        return interface.Constraint(interface.ConstraintKind.JSON_OBJECT)
    schema = wanted.json_schema.schema_
    text = json.dumps(schema)
    if len(text) > _MOST_SCHEMA_CHARACTERS:
        raise _schema_error(
            f"the schema has {len(text)} characters, at most {_MOST_SCHEMA_CHARACTERS} are accepted"
        )
    total = _count_repeats(schema, 1)
    if total > _MOST_REPEATS_IN_ALL:
        raise _schema_error(
            f"the repetitions make {total:g} in all, at most {_MOST_REPEATS_IN_ALL} are accepted"
        )
    return interface.Constraint(interface.ConstraintKind.JSON_SCHEMA, text)


def check_token_id(token_id: int, vocab_size: int, *, parameter: str) -> None:
    """Raise RequestError for an id outside the vocabulary."""
    if token_id >= vocab_size:
        raise errors.RequestError(
            f"{parameter}: {token_id} is no token id; ids are below {vocab_size}",
            parameter=parameter,
        )


def room_for(
    *,
    prompt_tokens: int,
    wanted: int | None,
    default: int | None,
    limits: interface.EngineLimits,
    parameter: str,
) -> int:
    """Return how many tokens an answer may have: as many as fit, where nothing says less.

    Raises RequestError when the prompt is too long, or leaves less room than wanted.
    """
    room = limits.max_sequence_tokens - prompt_tokens
    if prompt_tokens > limits.max_input_tokens or room < 1:
        raise errors.RequestError(
            f"the prompt has {prompt_tokens} tokens; at most {limits.max_input_tokens} "
            f"are accepted, and {limits.max_sequence_tokens} with the answer: shorten "
            "it or send fewer pictures",
            parameter=parameter,
            code="context_length_exceeded",
        )
    if wanted is not None and wanted > room:
        raise errors.RequestError(
            f"max_tokens is {wanted}, but {prompt_tokens} prompt tokens leave room for {room} "
            f"of {limits.max_sequence_tokens}: ask for at most {room}",
            parameter="max_tokens",
            code="context_length_exceeded",
        )
    return wanted or min(room, default or room)


def _log_probabilities(body: Fields) -> int | None:
    if isinstance(body, schemas.CompletionRequest):
        return body.logprobs
    return (body.top_logprobs or 0) if body.logprobs else None


def _need(capability: interface.Capability, limits: interface.EngineLimits) -> None:
    if capability not in limits.capabilities:
        raise errors.RequestError(
            f"{capability.value} is not offered by this engine; leave it out",
            parameter=capability.value,
        )


def _count_repeats(schema: Any, outer: float) -> float:
    """Bound the numbers that a grammar is unrolled by, and their product along a path.

    Returns the sum of the numbers. The depth of the body is bounded already.
    """
    if isinstance(schema, list):
        return sum(_count_repeats(part, outer) for part in schema)
    if not isinstance(schema, dict):
        return 0
    own = [
        (name, value)
        for name, value in schema.items()
        if name in _REPEATS and isinstance(value, int | float)
    ]
    for name, value in own:
        if value > _MOST_REPEATS:
            raise _schema_error(f"{name} is {value}, at most {_MOST_REPEATS} is accepted")
    repeats = sum(value for _, value in own)
    if isinstance(schema.get("pattern"), str):
        product = _check_pattern(schema["pattern"])
        outer *= product
        repeats += product - 1
    inner = outer * max([1, *(value for _, value in own)])
    if inner > _MOST_NESTED_REPEATS:
        raise _schema_error(
            f"repetitions inside of repetitions make {inner:g}, at most {_MOST_NESTED_REPEATS} "
            "are accepted"
        )
    return repeats + sum(_count_repeats(part, inner) for part in schema.values())


def _check_pattern(pattern: str) -> int:
    """Bound a regular expression; returns the product of its repetition counts."""
    product = math.prod(int(count) or 1 for count in _COUNTS.findall(pattern))
    groups = pattern.count("(")
    if len(pattern) > _MOST_PATTERN_CHARACTERS or groups > _MOST_GROUPS:
        raise _schema_error(
            f"a pattern has {len(pattern)} characters and {groups} groups, at most "
            f"{_MOST_PATTERN_CHARACTERS} and {_MOST_GROUPS} are accepted"
        )
    return product


def _schema_error(message: str) -> errors.RequestError:
    return errors.RequestError(
        f"response_format: {message}", parameter="response_format", code="invalid_schema"
    )
