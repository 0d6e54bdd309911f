"""From request fields to what an engine samples with."""

import dataclasses

import pytest
from internvl_runtime import errors
from internvl_runtime.engine import interface
from internvl_runtime.server import sampling, schemas

LIMITS = interface.EngineLimits(
    max_sequence_tokens=100, max_input_tokens=90, max_batched_tokens=50, max_batch_size=1,
    max_tiles_per_image=12, max_tiles_per_request=52,
)  # fmt: skip
BARE = dataclasses.replace(LIMITS, capabilities=frozenset())
NEEDING = [
    {"top_k": 5}, {"min_p": 0.1}, {"presence_penalty": 1}, {"frequency_penalty": -1},
    {"repetition_penalty": 1.1}, {"logit_bias": {"1": 2}}, {"logprobs": True},
    {"response_format": {"type": "json_object"}},
]  # fmt: skip
NEUTRAL = [
    {"top_k": -1}, {"top_k": 0}, {"min_p": 0}, {"presence_penalty": 0}, {"repetition_penalty": 1},
    {"logit_bias": {}}, {"logprobs": False}, {"response_format": {"type": "text"}},
    {"temperature": 0.5, "top_p": 0.5, "seed": 1, "n": 2, "stop": "x"},
]  # fmt: skip


def chat(**fields):
    messages = [{"role": "user", "content": "Hi"}]
    return schemas.ChatCompletionRequest.model_validate({"messages": messages, **fields})


@pytest.mark.parametrize("fields", NEEDING, ids=str)
def test_a_field_that_the_engine_does_not_offer_is_named(fields):
    (name,) = fields
    sampling.check_capabilities(chat(**fields), LIMITS)
    with pytest.raises(errors.RequestError, match=name) as caught:
        sampling.check_capabilities(chat(**fields), BARE)
    assert caught.value.parameter == name


@pytest.mark.parametrize("fields", NEUTRAL, ids=str)
def test_values_that_change_nothing_need_nothing(fields):
    sampling.check_capabilities(chat(**fields), BARE)


def test_fields_become_sampling():
    body = chat(temperature=0, top_k=-1, logit_bias={"7": -1}, logprobs=True, top_logprobs=2)
    made = sampling.sampling_of(body, max_tokens=3, vocab_size=10, answer_index=1)
    assert made == interface.Sampling(
        max_tokens=3, temperature=0.0, logit_bias=((7, -1.0),), log_probabilities=2, answer_index=1
    )


ROOM = [(10, None, None, 90), (10, None, 16, 16), (95, None, 16, None), (88, None, 16, 12),
        (10, 5, 16, 5), (10, 91, None, None)]  # fmt: skip


@pytest.mark.parametrize(("prompt_tokens", "wanted", "default", "expected"), ROOM)
def test_an_answer_has_the_room_that_is_left(prompt_tokens, wanted, default, expected):
    def room():
        return sampling.room_for(
            prompt_tokens=prompt_tokens, wanted=wanted, default=default, limits=LIMITS,
            parameter="messages",
        )  # fmt: skip

    if expected is None:
        with pytest.raises(errors.RequestError, match="tokens"):
            room()
    else:
        assert room() == expected


def test_unknown_fields_are_told_apart_from_those_without_effect():
    assert chat(user="me", store=True, fancy=1, tools=[]).unknown_fields() == ["fancy"]


def schema_body(schema):
    wanted = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
    return schemas.ChatCompletionRequest(
        messages=[{"role": "user", "content": "x"}], response_format=wanted
    )


def test_many_large_repetitions_are_refused_together():
    def strings(count):
        properties = {f"p{n}": {"type": "string", "maxLength": 1000} for n in range(count)}
        return {"type": "object", "properties": properties}

    assert sampling.constraint_of(schema_body(strings(10)))
    with pytest.raises(errors.RequestError, match="make 40000 in all, at most 16384"):
        sampling.constraint_of(schema_body(strings(40)))
