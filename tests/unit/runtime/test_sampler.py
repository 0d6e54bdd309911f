"""Choosing for many rows at once equals choosing for each row alone."""

import random
from collections import Counter

import numpy as np
import pytest
import torch
from internvl_runtime.engine import interface, sampling
from internvl_runtime.engine.pytorch import sampler

VOCABULARY = 300
GREEDY = interface.Sampling(max_tokens=9, temperature=0.0)


def random_sampling(rng):
    def maybe(value, neutral):
        return value if rng.random() < 0.4 else neutral

    return interface.Sampling(
        max_tokens=9,
        temperature=maybe(0.0, rng.uniform(0.2, 2)),
        top_p=maybe(rng.uniform(0.1, 1), 1.0),
        top_k=maybe(rng.randint(1, 2 * VOCABULARY), 0),
        min_p=maybe(rng.uniform(0, 0.3), 0.0),
        presence_penalty=maybe(rng.uniform(-2, 2), 0.0),
        frequency_penalty=maybe(rng.uniform(-2, 2), 0.0),
        repetition_penalty=maybe(rng.uniform(0.5, 2), 1.0),
        logit_bias=maybe(((3, -100.0), (7, 4.5)), ()),
        log_probabilities=maybe(rng.randint(0, 5), None),
        seed=maybe(rng.randrange(10**6), None),
        answer_index=rng.randrange(3),
    )


class Alone:
    """One answer by the row functions."""

    def __init__(self, name, wanted, prompt_ids):
        self.name, self.wanted, self.prompt_ids = name, wanted, prompt_ids
        self.generated = Counter()

    def choose(self, logits, allowed, position):
        row = sampling.adjust(
            logits, self.wanted, prompt_ids=self.prompt_ids, generated=self.generated
        )
        if allowed is not None:
            row = sampling.mask(row, allowed)
        token = sampling.choose(row, self.wanted, request_id=self.name, position=position)
        self.generated[token] += 1
        told = None
        if self.wanted.log_probabilities is not None:
            told = sampling.log_probabilities(logits, token, top=self.wanted.log_probabilities)
        return token, told


@pytest.mark.parametrize("seed", range(40))
def test_batches_equal_rows(seed):
    rng = random.Random(seed)
    generator = np.random.default_rng(seed)
    answers = [
        Alone(f"r{n}", random_sampling(rng), rng.sample(range(VOCABULARY), 20)) for n in range(7)
    ]
    seen = [
        sampler.watch(answer.prompt_ids, vocab_size=VOCABULARY, device=torch.device("cpu"))
        if sampling.counts_tokens(answer.wanted)
        else None
        for answer in answers
    ]
    for position in range(12):
        # Few levels make ties, which both must break alike.
        logits = generator.integers(-8, 8, (7, VOCABULARY)).astype(np.float32) / 3
        masks = [
            generator.random(VOCABULARY) < 0.2 if rng.random() < 0.3 else None for _ in answers
        ]
        rows = [
            sampler.Row(
                sampling=answer.wanted,
                origin=sampling.origin_of(answer.wanted, answer.name),
                position=position,
                seen=own,
                allowed=mask,
            )
            for answer, own, mask in zip(answers, seen, masks, strict=True)
        ]
        chosen = sampler.choose(torch.from_numpy(logits.copy()), rows)
        told = sampler.tell(chosen, rows)
        for number, answer in enumerate(answers):
            token, expected = answer.choose(logits[number], masks[number], position)
            assert chosen.token_ids[number] == token
            if expected is None:
                assert number not in told
            else:
                assert told[number].chosen == pytest.approx(expected.chosen, abs=1e-9)
                assert [i for i, _ in told[number].top] == [i for i, _ in expected.top]
                assert [v for _, v in told[number].top] == pytest.approx(
                    [v for _, v in expected.top], abs=1e-9
                )


def test_rows_that_ask_for_nothing_cost_one_argmax(monkeypatch):
    for name in ("_draw", "_adjust_row", "_cut"):
        monkeypatch.setattr(sampler, name, None)
    logits = torch.tensor([[0.0, 2.0, 1.0], [5.0, 2.0, 1.0]])
    rows = [sampler.Row(sampling=GREEDY, origin="r", position=0)] * 2
    chosen = sampler.choose(logits, rows)
    assert chosen.token_ids.tolist() == [1, 0]
    assert sampler.tell(chosen, rows) == {}


def test_the_models_logits_stay_as_they_are():
    logits = torch.ones(1, 8)
    biased = interface.Sampling(max_tokens=1, logit_bias=((2, 5.0),))
    sampler.choose(logits, [sampler.Row(sampling=biased, origin="r", position=0)])
    assert torch.equal(logits, torch.ones(1, 8))
