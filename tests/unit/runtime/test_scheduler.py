"""The scheduler, driven by a simulated model whose cache can be read."""

import random
import zlib

import hypothesis
import hypothesis.strategies as st
import pytest
from internvl_runtime.engine.pytorch import block_pool, scheduler
from internvl_runtime.engine.pytorch.block_pool import BLOCK_TOKENS
from internvl_runtime.model import prompt


def always(sequence, cached_tokens):
    del sequence, cached_tokens
    return True


def make(*, blocks=64, batch=4, tokens=32, can_start=always):
    limits = scheduler.Limits(max_batch_size=batch, max_batched_tokens=tokens)
    return scheduler.Scheduler(limits, block_pool.BlockPool(blocks), can_start=can_start)


class Model:
    """Chooses a token by all tokens in front of it, as they lie in the cache's blocks."""

    def __init__(self, planner, *, lag=0):
        self.planner = planner
        self.lag = lag
        self.cells = {}
        self.under_way = []
        self.answers = {}
        self.newest = {}
        self.steps = []

    def step(self):
        """Plan and compute a step; take in the results of the one `lag` steps before."""
        planned = self.planner.plan()
        if planned:
            self.steps.append(planned)
            self.under_way.append((planned, {c: self.compute(c) for c in planned.chunks}))
        if self.under_way and (planned is None or len(self.under_way) > self.lag):
            self.take_in(*self.under_way.pop(0))
        return planned

    def compute(self, chunk):
        sequence = chunk.sequence
        known = [*sequence.token_ids, *self.newest.get(sequence.request_id, [])]
        for place in range(chunk.start, chunk.end):
            block = sequence.blocks[place // BLOCK_TOKENS]
            self.cells[block, place % BLOCK_TOKENS] = known[place]
        read = [
            self.cells[sequence.blocks[place // BLOCK_TOKENS], place % BLOCK_TOKENS]
            for place in range(chunk.end)
        ]
        assert read == known[: chunk.end]
        if not chunk.chooses:
            return None
        token = next_token(read)
        self.newest.setdefault(sequence.request_id, []).append(token)
        return token

    def take_in(self, planned, chosen):
        tokens = {c.sequence.request_id: t for c, t in chosen.items() if c.chooses}
        self.planner.complete(planned, tokens)
        for request_id, token in tokens.items():
            if request_id not in self.answers:
                continue
            self.newest[request_id].pop(0)
            sequence, answer = self.answers[request_id]
            answer.append(token)
            if len(answer) == sequence.max_tokens or token % 17 == 0:
                self.end(request_id)

    def add(self, request_id, token_ids, *, max_tokens, **rest):
        sequence = self.planner.add(request_id, token_ids, max_tokens=max_tokens, **rest)
        self.answers[request_id] = (sequence, [])
        return sequence

    def end(self, request_id):
        self.planner.remove(request_id)
        self.newest.pop(request_id, None)
        return self.answers.pop(request_id)

    def run(self, limit=10_000):
        for _ in range(limit):
            if not self.step() and not self.under_way:
                assert not self.answers
                return
        raise AssertionError("does not end")


def next_token(token_ids):
    return zlib.crc32(str(token_ids).encode()) % 1000


def answer_alone(token_ids, max_tokens):
    made = []
    while len(made) < max_tokens and (not made or made[-1] % 17):
        made.append(next_token([*token_ids, *made]))
    return made


@hypothesis.settings(max_examples=150, deadline=None)
@hypothesis.given(
    seed=st.integers(0, 10**9),
    lag=st.integers(0, 1),
    blocks=st.integers(6, 24),
    batch=st.integers(1, 6),
    tokens=st.integers(6, 40),
)
def test_every_answer_is_whole_whatever_comes_and_goes(seed, lag, blocks, batch, tokens):
    rng = random.Random(seed)
    planner = make(blocks=blocks, batch=batch, tokens=tokens)
    model = Model(planner, lag=lag)
    expected, answers = {}, {}
    wanted = 25
    for _ in range(20_000):
        if len(expected) < wanted and rng.random() < 0.3:
            name = f"r{len(expected)}"
            length = rng.randint(1, 4 * BLOCK_TOKENS)
            start = rng.choice([0, 0, 1])
            prompt_ids = [(start + i) % 50 + rng.choice([0] * 30 + [1]) for i in range(length)]
            max_tokens = rng.randint(1, (blocks * BLOCK_TOKENS - length) // 2)
            expected[name] = answer_alone(prompt_ids, max_tokens)
            model.add(
                name,
                prompt_ids,
                max_tokens=max_tokens,
                priority=rng.choice([-1, 0, 0, 1]),
                waits_for_tokens=rng.random() < 0.2,
            )
            answers[name] = model.answers[name][1]
        if model.answers and rng.random() < 0.02:
            name = rng.choice(list(model.answers))
            made = model.end(name)[1]
            assert made == expected[name][: len(made)]
            expected[name] = made
        if rng.random() < 0.03 and planner.running:
            planner.preempt(rng.choice(planner.running))
        planned = model.step()
        if planned:
            check_step(planned, planner)
        elif len(expected) == wanted and not model.answers and not model.under_way:
            break
    assert answers == expected
    assert planner.pool.free == blocks
    assert not planner.running and not planner.waiting
    assert not planner.pool._announced


def check_step(planned, planner):
    assert 0 < planned.tokens <= planner.limits.max_batched_tokens
    sequences = [chunk.sequence.request_id for chunk in planned.chunks]
    assert len(set(sequences)) == len(sequences)
    assert len(planner.running) <= planner.limits.max_batch_size


def test_steps_that_failed_are_computed_again():
    rng = random.Random(5)
    model = Model(make(blocks=20, tokens=24))
    expected = {}
    for number in range(12):
        ids = [rng.randrange(40) for _ in range(rng.randint(1, 60))]
        expected[f"r{number}"] = answer_alone(ids, 9)
        model.add(f"r{number}", ids, max_tokens=9)
    answers = {name: answer for name, (_, answer) in model.answers.items()}
    while model.answers:
        if rng.random() < 0.3 and (planned := model.planner.plan()):
            model.planner.undo(planned)
        model.step()
    assert answers == expected


def test_sixteen_equal_requests_share_their_beginning_and_their_steps():
    model = Model(make(blocks=200, batch=16, tokens=64))
    ids = [i % 16 for i in range(200)]
    for number in range(16):
        model.add(f"r{number}", ids, max_tokens=12)
    found = [sequence for sequence, _ in model.answers.values()]
    model.run()
    assert [sequence.cached_tokens for sequence in found] == [0] + [192] * 15
    decodes = [step.decodes for step in model.steps if step.decodes]
    assert sorted(decodes)[len(decodes) // 2] >= 12
    assert len(model.steps) <= 1.3 * (12 + 16 * 200 / 64)


def test_a_short_prompt_is_not_held_up_by_a_long_one():
    model = Model(make(blocks=2100, tokens=512))
    model.add("long", list(range(30_000)), max_tokens=3)
    model.step()
    model.add("short", list(range(16)), max_tokens=3)
    model.step()
    assert model.answers["short"][1]
    assert not model.answers["long"][1]
    assert model.steps[-1].tokens == 512


def test_prefill_and_decode_share_a_step():
    model = Model(make(blocks=100, tokens=40))
    model.add("first", [1, 2, 3], max_tokens=40)
    model.step()
    model.add("second", list(range(100)), max_tokens=2)
    planned = model.step()
    assert (planned.decodes, planned.tokens) == (1, 40)


def test_nobody_is_overtaken_more_often_than_priority_allows():
    model = Model(make(blocks=40, batch=2, tokens=16))
    model.add("patient", list(range(20)), max_tokens=2, priority=1)
    for number in range(3 * scheduler.PRIORITY_ARRIVALS):
        model.add(f"r{number}", [number], max_tokens=2)
    finished = 0
    while "patient" in model.answers:
        before = len(model.answers)
        model.step()
        finished += before - len(model.answers)
    assert finished <= scheduler.PRIORITY_ARRIVALS + 2


def test_a_full_pool_takes_back_the_last_and_finishes_all():
    model = Model(make(blocks=5, batch=4, tokens=64))
    ids = [list(range(k, k + 18)) for k in (101, 141)]
    expected = [answer_alone(each, 40) for each in ids]
    assert all(len(answer) > 30 for answer in expected)
    for number, each in enumerate(ids):
        model.add(f"r{number}", each, max_tokens=40)
    answers = [answer for _, answer in model.answers.values()]
    model.run()
    assert answers == expected
    assert model.planner.preemptions >= 1


def test_a_sequence_waits_until_its_pictures_are_at_hand():
    ready = {"text"}
    model = Model(make(can_start=lambda sequence, cached: sequence.request_id in ready))
    model.add("pictures", [1, 2], max_tokens=1)
    model.add("text", [3, 4], max_tokens=1)
    planned = model.step()
    assert [chunk.sequence.request_id for chunk in planned.chunks] == ["text"]
    ready.add("pictures")
    assert model.step().chunks[0].sequence.request_id == "pictures"


def test_pictures_tell_equal_tokens_apart():
    ids = [9] * 64
    placement = prompt.ImagePlacement(index=0, offset=20, length=30)

    def hashes(content):
        return block_pool.chain_hashes(ids, [(placement, content)])

    one, other = hashes("a"), hashes("b")
    assert one == hashes("a")
    assert [a == b for a, b in zip(one, other, strict=True)] == [True, False, False, False]
    moved = prompt.ImagePlacement(index=0, offset=36, length=14)
    assert block_pool.chain_hashes(ids, [(moved, "a")])[2:] != one[2:]


def test_what_nobody_holds_is_taken_oldest_first():
    pool = block_pool.BlockPool(3)
    for number in range(3):
        (block,) = pool.allocate(1)
        pool.publish(block, b"%d" % number)
        pool.release([block])
    assert [len(pool.find([b"%d" % n])) for n in range(3)] == [1, 1, 1]
    pool.allocate(1)
    assert [len(pool.find([b"%d" % n])) for n in range(3)] == [0, 1, 1]
    with pytest.raises(block_pool.OutOfBlocksError, match="3 blocks are wanted, 2 are free"):
        pool.allocate(3)
