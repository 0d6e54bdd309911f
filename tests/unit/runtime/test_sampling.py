import math

import numpy as np
import pytest
from internvl_runtime.engine import interface, sampling


def row_of(*values):
    return np.array(values, dtype=np.float32)


def test_temperature_zero_takes_the_first_largest():
    row = np.array([0.0, 3.0, 3.0], dtype=np.float32)
    greedy = interface.Sampling(max_tokens=1, temperature=0.0)
    assert sampling.choose(row, greedy, request_id="r", position=0) == 1


def test_a_temperature_next_to_zero_is_zero():
    row = np.array([0.0, 3.0, 1.0], dtype=np.float32)
    cold = interface.Sampling(max_tokens=1, temperature=1e-308)
    assert sampling.choose(row, cold, request_id="r", position=0) == 1


def test_a_seed_repeats_its_choices():
    row = np.zeros(1000, dtype=np.float32)
    seeded = interface.Sampling(max_tokens=1, seed=5)

    def choices(request_id):
        return [sampling.choose(row, seeded, request_id=request_id, position=n) for n in range(20)]

    assert choices("a") == choices("b")
    assert len(set(choices("a"))) > 10


def test_the_nucleus_keeps_the_smallest_set_that_reaches_top_p():
    row = np.log(np.array([0.5, 0.3, 0.15, 0.05], dtype=np.float32))
    nucleus = interface.Sampling(max_tokens=1, top_p=0.7)
    kept = sampling.probabilities_of(row, nucleus)
    assert np.allclose(kept, [0.625, 0.375, 0, 0])


def test_sampling_follows_the_distribution():
    row = np.log(np.array([0.7, 0.2, 0.1], dtype=np.float32))
    free = interface.Sampling(max_tokens=1, seed=1)
    drawn = [sampling.choose(row, free, request_id="r", position=n) for n in range(20_000)]
    assert np.allclose(np.bincount(drawn) / 20_000, [0.7, 0.2, 0.1], atol=0.015)


def kept_by(row, **fields):
    made = sampling.probabilities_of(row, interface.Sampling(max_tokens=1, **fields))
    return np.flatnonzero(made > 1e-9).tolist()


CUTS = [
    ({"top_k": 2}, [0, 1]),
    ({"top_k": 0}, [0, 1, 2, 3]),
    ({"top_k": 10}, [0, 1, 2, 3]),
    ({"min_p": 0.5}, [0, 1]),
    ({"min_p": 0.0}, [0, 1, 2, 3]),
    ({"top_k": 3, "top_p": 0.5}, [0]),
    ({"top_p": 0.8}, [0, 1]),
]


@pytest.mark.parametrize(("fields", "expected"), CUTS, ids=str)
def test_cuts_keep_what_their_definitions_say(fields, expected):
    row = np.log(row_of(0.5, 0.3, 0.15, 0.05))
    assert kept_by(row, **fields) == expected


def test_temperature_sharpens_and_flattens():
    row = row_of(1.0, 0.0)
    for temperature in (0.25, 1.0, 2.0):
        made = sampling.probabilities_of(
            row, interface.Sampling(max_tokens=1, temperature=temperature)
        )
        assert made[0] == pytest.approx(1 / (1 + math.exp(-1 / temperature)))


def adjusted(row, *, prompt_ids=(), generated=None, **fields):
    wanted = interface.Sampling(max_tokens=1, **fields)
    made = sampling.adjust(row, wanted, prompt_ids=prompt_ids, generated=generated or {})
    return made.tolist()


def test_nothing_wanted_leaves_the_row_as_it_is():
    row = row_of(1, 2)
    wanted = interface.Sampling(max_tokens=1)
    assert sampling.adjust(row, wanted, prompt_ids=(0,), generated={1: 3}) is row


def test_presence_and_frequency_count_the_answer_alone():
    row = row_of(1, 1, 1)
    assert adjusted(row, prompt_ids=(0,), generated={1: 3}, presence_penalty=0.5) == [1, 0.5, 1]
    assert adjusted(row, prompt_ids=(0,), generated={1: 3}, frequency_penalty=0.5) == [1, -0.5, 1]
    assert row.tolist() == [1, 1, 1]


def test_the_repetition_penalty_counts_prompt_and_answer():
    row = row_of(2, -2, 2, -2)
    made = adjusted(row, prompt_ids=(0,), generated={1: 1}, repetition_penalty=2.0)
    assert made == [1, -4, 2, -2]


def test_bias_is_added():
    assert adjusted(row_of(0, 0), logit_bias=((1, 2.5),)) == [0, 2.5]


def test_a_mask_takes_tokens_out():
    masked = sampling.mask(row_of(3, 2, 1), np.array([False, True, True]))
    greedy = interface.Sampling(max_tokens=1, temperature=0.0)
    assert sampling.choose(masked, greedy, request_id="r", position=0) == 1


def test_log_probabilities_are_the_models_own():
    told = sampling.log_probabilities(np.log(row_of(0.25, 0.5, 0.25)), 0, top=2)
    assert told.chosen == pytest.approx(math.log(0.25))
    assert [token for token, _ in told.top] == [1, 0]
    assert told.top[0][1] == pytest.approx(math.log(0.5))


def test_answers_to_one_prompt_differ_by_their_index():
    row = np.zeros(1000, dtype=np.float32)
    first, second = (
        [
            sampling.choose(
                row,
                interface.Sampling(max_tokens=1, seed=5, answer_index=index),
                request_id="r",
                position=position,
            )
            for position in range(10)
        ]
        for index in (0, 1)
    )
    assert first != second


ENDS = [
    (7, 1, interface.FinishReason.STOP),
    (1, 1, None),
    (1, 4, interface.FinishReason.LENGTH),
    (7, 4, interface.FinishReason.STOP),
]


@pytest.mark.parametrize(("token_id", "generated", "expected"), ENDS)
def test_an_answer_ends_by_a_stop_token_or_its_length(token_id, generated, expected):
    reason = sampling.finish_reason(token_id, stop_token_ids={7}, generated=generated, max_tokens=4)
    assert reason is expected
