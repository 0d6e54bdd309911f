"""Many requests at once give the tokens that each gives alone; and they really share steps."""

import random
import statistics

import in_process
import pytest
import torch
from asking import answer_alone, ask, assert_equal_but_for_ties, collect, picture, words
from internvl_runtime import errors
from internvl_runtime.engine import folder, interface, stepping
from internvl_runtime.engine.pytorch import attention, loading
from internvl_runtime.model import tensor_parallel

TIE = 1e-3
"""Where alone the two best tokens' logits are as close as this, other sums may choose the other."""


@pytest.fixture(scope="module")
def context(qwen_engine):
    return folder.open_engine(qwen_engine).load_tokenizer().control_ids["<IMG_CONTEXT>"]


@pytest.fixture(scope="module")
def load(qwen_engine):
    def load_engine(*, tokens=None, lag=0, **limits):
        per_block = attention.bytes_per_block(
            tensor_parallel.share(language_of(qwen_engine), 1), torch.float32
        )
        options = loading.Options(kv_cache_bytes=(tokens or 40_000) // 16 * per_block, lag=lag)
        limits.setdefault("max_sequence_tokens", min((tokens or 40_000) // 16 * 16, 32_768))
        return in_process.load(qwen_engine, options=options, **limits)

    return load_engine


def language_of(engine_dir):
    return folder.open_engine(engine_dir).model.language


@pytest.mark.parametrize("lag", [0, 1])
def test_two_hundred_requests_with_memory_for_a_third(load, context, lag):
    rng = random.Random(lag)
    shared = words(rng, 70)
    asked = []
    for number in range(200):
        parts = [shared[: rng.randrange(71)], words(rng, rng.randrange(1, 60))]
        if rng.random() < 0.15:
            parts.insert(1, picture(rng.randrange(6)))
        sampling = interface.Sampling(
            max_tokens=rng.randrange(1, 64),
            temperature=rng.choice([0.0, 0.0, 1.0]),
            top_p=rng.choice([1.0, 0.9]),
            repetition_penalty=rng.choice([1.0, 1.2]),
            seed=rng.choice([None, 7]),
        )
        asked.append(ask(f"r{number}", parts, context=context, sampling=sampling))
    alone = load(max_batch_size=1)
    expected = {request.request_id: answer_alone(alone, request, tiles) for request, tiles in asked}
    needed = sum(len(r.prompt.token_ids) + r.sampling.max_tokens for r, _ in asked[:16])
    engine = load(tokens=needed // 3, lag=lag, max_batch_size=16, max_batched_tokens=256)
    answers, cancelled = {}, set()
    rng.shuffle(asked)
    for request, tiles in asked:
        engine.submit(request, tiles)
        if rng.random() < 0.5:
            for step in engine.step():
                answers.setdefault(step.request_id, []).extend(step.token_ids)
        if rng.random() < 0.1:
            cancelled.add(request.request_id)
            engine.cancel(request.request_id)
    collect(engine, answers)
    for request, _ in asked:
        given = answers.get(request.request_id, [])
        tokens, margins = expected[request.request_id]
        if request.request_id not in cancelled:
            assert len(given) == len(tokens)
        assert_equal_but_for_ties(given, tokens, margins, tie=TIE)
    assert engine.scheduler.preemptions > 0
    assert engine.scheduler.pool.free == engine.scheduler.pool.count


def test_sixteen_equal_requests_share_steps(load, context):
    budget, tokens = 256, 24
    engine = load(max_batch_size=16, max_batched_tokens=budget)
    rng = random.Random(1)
    prompts = [words(rng, 100) for _ in range(16)]
    for number, ids in enumerate(prompts):
        engine.submit(*ask(f"r{number}", [ids], context=context, max_tokens=tokens))
    collect(engine, {})
    reports = engine.take_reports()
    assert statistics.median(r.decodes for r in reports if r.decodes) >= 12
    assert any(r.decodes and r.prefill_tokens for r in reports)
    assert max(r.tokens for r in reports) <= budget
    assert len(reports) <= 1.3 * (tokens + 16 * 100 / budget)


def test_tiles_of_waiting_requests_share_a_pass(load, context):
    engine = load(max_batch_size=16, max_batched_tokens=2048)
    for number in range(4):
        parts = [[7], picture(100 + number), [8, 9]]
        engine.submit(*ask(f"r{number}", parts, context=context))
    collect(engine, {})
    assert (engine.runner.tower_passes, engine.runner.tiles_encoded) == (1, 4)


def test_tiles_of_waiting_requests_share_a_pass_though_their_prompts_do_not_fit(load, context):
    engine = load(max_batch_size=16, max_batched_tokens=256)
    for number in range(4):
        parts = [[7], picture(110 + number), [8, 9]]
        engine.submit(*ask(f"r{number}", parts, context=context))
    collect(engine, {})
    assert (engine.runner.tower_passes, engine.runner.tiles_encoded) == (1, 4)


def test_a_short_request_overtakes_a_long_prefill(load, context):
    engine = load(max_batch_size=4, max_batched_tokens=1024)
    rng = random.Random(2)
    engine.submit(*ask("long", [words(rng, 30_000)], context=context))
    engine.step()
    engine.submit(*ask("short", [words(rng, 16)], context=context))
    answers = {}
    collect(engine, answers, until=lambda: "short" in answers)
    assert "long" not in answers


def test_a_second_turn_computes_nothing_twice(load, context):
    rng = random.Random(3)
    first, second = picture(20, tiles=3), picture(21)
    opening = [words(rng, 30), first, words(rng, 9), second, words(rng, 5)]
    engine = load(max_batch_size=4)
    request, tiles = ask("one", opening, context=context)
    answer = [t for step in stepping.answer(engine, request, tiles) for t in step.token_ids]
    computed = sum(report.tokens for report in engine.take_reports())
    passes = engine.runner.tower_passes

    later = [*opening, answer, words(rng, 12)]
    request, tiles = ask("two", later, context=context)
    # No tiles: the worker would have to ask for them.
    steps = list(stepping.answer(engine, request))
    again = sum(report.prefill_tokens for report in engine.take_reports())
    cached = steps[0].start.cached_tokens
    # The last token of an answer is never fed back, and so not in the cache.
    assert cached == (computed // 16) * 16
    assert again == len(request.prompt.token_ids) - cached
    assert engine.runner.tower_passes == passes

    cold = load(max_batch_size=4)
    tokens, margins = answer_alone(cold, request, tiles)
    assert_equal_but_for_ties([t for s in steps for t in s.token_ids], tokens, margins, tie=TIE)


def test_pictures_never_mix(load, context):
    engine = load(max_batch_size=4)
    ids = words(random.Random(4), 20)
    for number in range(4):
        request, tiles = ask(f"r{number}", [ids, picture(30 + number), ids], context=context)
        cold = load(max_batch_size=1)
        tokens, margins = answer_alone(cold, request, tiles)
        given = [t for step in stepping.answer(engine, request, tiles) for t in step.token_ids]
        assert_equal_but_for_ties(given, tokens, margins, tie=TIE)


def test_answers_to_one_prompt_compute_it_once(load, context):
    engine = load(max_batch_size=8)
    ids = words(random.Random(5), 160)
    for number in range(4):
        engine.submit(*ask(f"r{number}", [ids], context=context, max_tokens=1))
    collect(engine, {})
    assert sum(report.prefill_tokens for report in engine.take_reports()) == 160 + 3 * 16


class Scarce:
    """Attention that has memory for few tokens."""

    def __init__(self, inner, most):
        self.inner, self.most, self.refusals = inner, most, 0

    def begin(self, spans):
        if sum(span.length for span in spans) > self.most:
            self.refusals += 1
            raise MemoryError
        self.inner.begin(spans)

    def attend(self, *arguments):
        return self.inner.attend(*arguments)


@pytest.mark.parametrize("lag", [0, 1])
def test_short_memory_makes_steps_smaller_and_loses_nothing(load, context, lag):
    rng = random.Random(6)
    asked = [ask(f"r{n}", [words(rng, 90)], context=context, max_tokens=6) for n in range(8)]
    alone = load(max_batch_size=1)
    expected = {r.request_id: answer_alone(alone, r, tiles) for r, tiles in asked}
    engine = load(max_batch_size=8, max_batched_tokens=512, lag=lag)
    engine.runner._attend = scarce = Scarce(engine.runner._attend, 40)
    for request, tiles in asked:
        engine.submit(request, tiles)
    answers = {}
    collect(engine, answers)
    assert scarce.refusals
    for name, (tokens, margins) in expected.items():
        assert len(answers[name]) == len(tokens)
        assert_equal_but_for_ties(answers[name], tokens, margins, tie=TIE)


def test_a_request_that_no_memory_is_enough_for_is_refused_and_others_go_on(load, context):
    engine = load(max_batch_size=2)
    inner, engine.runner._attend = engine.runner._attend, Scarce(engine.runner._attend, 0)
    engine.submit(*ask("large", [[5, 6, 7]], context=context))
    made = []
    while engine.has_work:
        made += engine.step()
    assert isinstance(made[-1].error, errors.EngineUnavailableError)
    assert "not enough memory" in str(made[-1].error)
    engine.runner._attend = inner
    request, tiles = ask("small", [[5, 6, 7]], context=context)
    assert len(list(stepping.answer(engine, request, tiles))) == 8


def test_what_can_never_fit_is_refused_with_the_numbers(load, context):
    engine = load(tokens=512, max_batch_size=2, max_sequence_tokens=512)
    engine._max_sequence_tokens = 4096
    with pytest.raises(errors.RequestError, match=r"600 prompt tokens and 8 .* 512 tokens"):
        list(stepping.answer(engine, *ask("r", [[5] * 600], context=context)))
