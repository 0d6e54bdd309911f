"""The TensorRT engine with strict doubles of the executor and of TensorRT, against PyTorch's."""

import dataclasses
import random
import time

import nvidia_image
import pytest
import torch
from asking import answer_alone, ask, collect, picture, words
from internvl_doubles import executor as double
from internvl_runtime import errors
from internvl_runtime.artifacts import convert, journal, progress, synthesize, tensorrt_build
from internvl_runtime.artifacts import shapes as published_shapes
from internvl_runtime.engine import interface, stepping
from internvl_runtime.engine.pytorch import loading as pytorch_loading
from internvl_runtime.engine.tensorrt import loading, vision
from internvl_runtime.model import config

LIMITS = interface.EngineLimits(
    max_sequence_tokens=4096, max_input_tokens=4095, max_batched_tokens=512, max_batch_size=4,
    max_tiles_per_image=6, max_tiles_per_request=8,
)  # fmt: skip
CONTEXT = 3


@pytest.fixture(scope="module", autouse=True)
def image(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        nvidia_image.enter(patch, tmp_path_factory.mktemp("site"))
        yield


@pytest.fixture(scope="module", params=list(config.Family), ids=str)
def built(request, tmp_path_factory):
    """A checkpoint, its model, and the engines built from it."""
    published = tmp_path_factory.mktemp("published")
    recipe = synthesize.Recipe(published_shapes.TINY, request.param, 1)
    synthesize.write_checkpoint(
        recipe, published, tokenizer_model=published, report=lambda *_: None
    )
    checkpoint = tmp_path_factory.mktemp("checkpoint")
    convert.write_checkpoint(
        published, checkpoint, dtype="float32", ranks=1, report=lambda *_: None
    )
    model = config.read_model_config(checkpoint / "model")
    workspace = tmp_path_factory.mktemp("workspace")
    tensorrt_build.build(
        checkpoint, model, workspace, LIMITS, dtype="float32", quantization="None", ranks=1,
        built=journal.Journal(workspace / "journal"),
        timings=tmp_path_factory.mktemp("timings"), stage=progress.Progress("build"),
    )  # fmt: skip
    return checkpoint, model, workspace


@pytest.fixture
def engine(built):
    loaded = loading.load_engine(built[2], LIMITS, picture_cache_bytes=2**28)
    yield loaded
    loaded.close()


@pytest.fixture(scope="module")
def alone(built):
    """The PyTorch engine, which answers one request at a time."""
    checkpoint, model, _ = built
    return pytorch_loading.load_engine(
        checkpoint, model, LIMITS, options=pytorch_loading.Options(kv_cache_bytes=2**28)
    )


def test_requests_of_a_batch_get_the_tokens_of_the_pytorch_engine(engine, alone):
    rng = random.Random(1)
    asked = []
    for number in range(16):
        parts = [words(rng, rng.randrange(1, 90))]
        if number % 2:
            parts[1:] = [picture(number % 6, tiles=1 + number % 3), words(rng, 5)]
        if number % 4 == 3:
            parts += [picture(9), words(rng, 3)]
        asked.append(ask(f"r{number}", parts, context=CONTEXT, max_tokens=rng.randrange(1, 24)))
    expected = {each.request_id: answer_alone(alone, each, tiles)[0] for each, tiles in asked}

    answers = {}
    for request, tiles in asked:
        engine.submit(request, tiles)
    collect(engine, answers)

    assert answers == expected
    reports = engine.take_reports()
    assert max(report.decodes for report in reports) > 1
    assert sum(report.tower_passes for report in reports) < 8


def test_a_second_turn_reuses_the_blocks_of_the_first(engine, alone):
    rng = random.Random(2)
    first = [words(rng, 20), picture(1, tiles=2), words(rng, 9), picture(2), words(rng, 30)]
    request, tiles = ask("first", first, context=CONTEXT)
    steps = list(stepping.answer(engine, request, tiles))
    answer = [token for step in steps for token in step.token_ids]
    passes = sum(report.tower_passes for report in engine.take_reports())
    again, more = ask("second", [*first, answer, words(rng, 12)], context=CONTEXT)
    steps = list(stepping.answer(engine, again, more))

    # The last token of an answer is not computed.
    known = len(request.prompt.token_ids) + len(answer) - 1
    assert sum(step.start.cached_tokens for step in steps if step.start) == known // 32 * 32
    assert [token for step in steps for token in step.token_ids] == answer_alone(
        alone, again, more
    )[0]
    assert passes >= 1
    assert sum(report.tower_passes for report in engine.take_reports()) == 0


def test_other_pictures_of_the_same_size_reuse_nothing_of_each_other(engine, alone):
    for seed in (1, 2):
        request, tiles = ask(f"p{seed}", [picture(seed), [7, 8, 9]], context=CONTEXT)
        given = [t for step in stepping.answer(engine, request, tiles) for t in step.token_ids]
        assert given == answer_alone(alone, request, tiles)[0]


@pytest.mark.parametrize(
    ("parts", "words_of_it"),
    [
        ([[5] * 4096], "4096 prompt tokens, the engine was built for 4095"),
        ([picture(1, tiles=9), [5]], "2304 image tokens, the engine was built for 2048"),
        ([[512]], "token id 512 is not below"),
    ],
)
def test_what_is_beyond_the_engine_never_reaches_the_executor(engine, parts, words_of_it):
    request, tiles = ask("r", parts, context=CONTEXT)
    with pytest.raises(errors.RequestError, match=words_of_it):
        list(stepping.answer(engine, request, tiles))
    request, tiles = ask("next", [[5, 6]], context=CONTEXT)
    assert len(list(stepping.answer(engine, request, tiles))) == 8


def test_an_answer_ends_at_the_longest_sequence(engine):
    request, tiles = ask("r", [[5] * 4090], context=CONTEXT, max_tokens=100)
    steps = list(stepping.answer(engine, request, tiles))
    assert sum(len(step.token_ids) for step in steps) == 6
    assert steps[-1].finish_reason is interface.FinishReason.LENGTH


def test_every_iteration_between_two_steps_is_reported(engine):
    request, tiles = ask("r", [[5] * 9], context=CONTEXT, max_tokens=20)
    engine.submit(request, tiles)
    engine.step()
    deadline = time.monotonic() + 10
    while engine._executor._running and time.monotonic() < deadline:
        time.sleep(0.01)
    decodes = 0
    while decodes < 19 and time.monotonic() < deadline:
        engine.step()
        decodes += sum(report.decodes for report in engine.take_reports())
    assert decodes == 19


def test_cancelled_requests_end_and_others_go_on(engine, alone):
    asked = [ask(f"r{n}", [[5 + n] * 9], context=CONTEXT, max_tokens=40) for n in range(8)]
    for request, tiles in asked:
        engine.submit(request, tiles)
    answers = {}
    assert engine.load().waiting == 8
    collect(engine, answers, until=lambda: len(answers.get("r0", [])) >= 5)
    # Two more than the batch are at hand when one of it ends.
    load = engine.load()
    assert (load.running, load.waiting) == (6, 2)
    assert load.blocks_used == engine._counts.blocks_used > 0
    for number in (0, 2, 7):
        engine.cancel(f"r{number}")
    before = {name: len(answers.get(name, [])) for name in ("r0", "r2", "r7")}
    collect(engine, answers)
    # The last one was not in the executor yet.
    assert len(engine._executor.cancelled) == 2

    for request, tiles in asked:
        name = request.request_id
        if name in before:
            assert len(answers.get(name, [])) == before[name]
        else:
            assert answers[name] == answer_alone(alone, request, tiles)[0]


def test_log_probabilities_of_chosen_tokens_are_told(engine, alone):
    sampling = interface.Sampling(max_tokens=6, temperature=0.0, log_probabilities=0)
    request, tiles = ask("r", [[5, 6, 7]], context=CONTEXT, sampling=sampling)
    told, expected = (
        [each.chosen for step in stepping.answer(e, request, tiles) for each in
         step.log_probabilities]
        for e in (engine, alone)
    )  # fmt: skip
    assert told == pytest.approx(expected, abs=1e-4)


def test_a_build_is_told_the_likeliest_tokens(built, alone):
    loaded = loading.load_engine(built[2], LIMITS, picture_cache_bytes=2**28, tells_logits=True)
    sampling = interface.Sampling(max_tokens=6, temperature=0.0, log_probabilities=5)
    request, tiles = ask("r", [[5, 6, 7]], context=CONTEXT, sampling=sampling)
    told, expected = (
        [each for step in stepping.answer(e, request, tiles) for each in step.log_probabilities]
        for e in (loaded, alone)
    )
    loaded.close()

    assert [[token for token, _ in each.top] for each in told] == [
        [token for token, _ in each.top] for each in expected
    ]
    assert torch.allclose(
        torch.tensor([each.chosen for each in told]),
        torch.tensor([each.chosen for each in expected]),
        atol=1e-4,
    )


def run(engine, until):
    steps = []
    while not until(steps):
        steps += engine.step()
    return steps


def ended(count):
    return lambda steps: sum(step.is_last for step in steps) == count


def test_pictures_are_asked_for_when_they_are_needed(built):
    asked = []
    loaded = loading.load_engine(
        built[2], LIMITS, picture_cache_bytes=2**28,
        load_picture=lambda name, index: asked.append((name, index)),
    )  # fmt: skip
    (first, tiles), (second, _) = (
        ask(name, [[5], picture(1), [6], picture(2)], context=CONTEXT) for name in ("a", "b")
    )
    hashes = list(tiles)
    loaded.submit(first)
    loaded.submit(second)
    loaded.step()
    assert asked == [("a", 0), ("a", 1)]
    # What was asked for in its name may never come.
    loaded.cancel("a")
    loaded.step()
    assert asked[2:] == [("b", 0), ("b", 1)]
    assert not loaded.is_busy

    loaded.put_tiles(hashes[0], tiles[hashes[0]])
    loaded.put_tiles(hashes[1], tiles[hashes[1]])
    steps = run(loaded, ended(1))
    loaded.close()

    assert {step.request_id for step in steps} == {"b"}
    assert steps[-1].finish_reason is interface.FinishReason.LENGTH


def test_a_picture_that_can_not_be_loaded_fails_who_needs_it(built):
    loaded = loading.load_engine(
        built[2], LIMITS, picture_cache_bytes=2**28, load_picture=lambda *_: None
    )
    needing, tiles = ask("needing", [[5], picture(1)], context=CONTEXT)
    other, _ = ask("other", [[5, 6]], context=CONTEXT)
    loaded.submit(needing)
    loaded.submit(other)
    steps = loaded.step()
    loaded.fail_picture(next(iter(tiles)), errors.RequestError("it is none", parameter="messages"))
    steps += run(loaded, ended(2 - sum(step.is_last for step in steps)))
    has_work = loaded.has_work
    loaded.close()

    assert not has_work
    failed = {step.request_id: step.error for step in steps if step.error}
    assert {name: str(error) for name, error in failed.items()} == {"needing": "it is none"}


def test_a_failing_vision_engine_fails_its_requests_alone(engine, monkeypatch):
    def fail(_):
        raise errors.EngineUnavailableError("the vision engine failed")

    with_picture, tiles = ask("with", [[5], picture(1)], context=CONTEXT)
    monkeypatch.setattr(engine._tower, "encode", fail)
    with pytest.raises(errors.EngineUnavailableError, match="the server's log says why"):
        list(stepping.answer(engine, with_picture, tiles))
    monkeypatch.undo()

    assert len(list(stepping.answer(engine, with_picture, tiles))) == 8


def test_a_lower_priority_is_served_earlier(built):
    limits = dataclasses.replace(LIMITS, max_batch_size=1)
    loaded = loading.load_engine(built[2], limits, picture_cache_bytes=2**28)
    for number, priority in enumerate([5, 1, -3, 0, 2, -1]):
        request, _ = ask(f"p{priority}", [[5 + number]], context=CONTEXT, priority=priority)
        loaded.submit(request)
    steps = run(loaded, ended(6))
    loaded.close()

    assert [step.request_id for step in steps if step.is_last] == [
        f"p{priority}" for priority in (-3, -1, 0, 1, 2, 5)
    ]


def test_an_answer_ends_with_its_stop_token_and_tells_how_likely_each_was(engine, alone):
    request, tiles = ask("r", [[9, 8, 7]], context=CONTEXT, max_tokens=12)
    tokens, _ = answer_alone(alone, request, tiles)
    sampling = dataclasses.replace(request.sampling, log_probabilities=0)
    request = dataclasses.replace(
        request, sampling=sampling, stop_token_ids=frozenset({tokens[4], 0, 511})
    )
    steps = list(stepping.answer(engine, request, tiles))

    given = [token for step in steps for token in step.token_ids]
    assert given == tokens[: tokens.index(tokens[4]) + 1]
    assert steps[-1].finish_reason is interface.FinishReason.STOP
    assert sum(len(step.log_probabilities) for step in steps) == len(given)


def test_a_picture_whose_asker_left_while_it_was_encoded_is_kept_once(built):
    loaded = loading.load_engine(
        built[2], LIMITS, picture_cache_bytes=2**28, load_picture=lambda *_: None
    )
    (first, tiles), (second, _) = (
        ask(name, [[5], picture(1)], context=CONTEXT) for name in ("a", "b")
    )
    ((content_hash, own),) = tiles.items()
    loaded.submit(first)
    loaded.step()
    loaded.put_tiles(content_hash, own)
    loaded.step()
    loaded.cancel("a")
    loaded.submit(second)
    steps = run(loaded, ended(1))
    loaded.put_tiles(content_hash, own)
    held, load = loaded.pictures.feature_bytes, loaded.load()
    loaded.close()

    assert {step.request_id for step in steps} == {"b"}
    assert load.picture_cache_bytes == held
    assert held == 256 * built[1].language.hidden_size * 4
    assert not loaded.pictures.waiting


def test_ranks_behind_the_leader_are_made_as_it_is_and_wait_for_it(built, monkeypatch):
    made = []

    class Recorded(double.Executor):
        def __init__(self, folder, kind, config):
            made.append([folder, kind, double._told(config)])
            super().__init__(folder, kind, config)

        def shutdown(self):
            made[-1].append("shut down")
            super().shutdown()

    from tensorrt_llm.bindings import executor as module

    monkeypatch.setattr(module, "Executor", Recorded)
    ways = {"kv_cache_bytes": 2**27, "tells_logits": True}
    loading.load_engine(built[2], LIMITS, picture_cache_bytes=2**28, **ways).close()
    loading.follow(built[2], LIMITS, **ways)
    leader, behind = made
    assert leader == behind
    assert leader[0] == built[2] / "language"
    assert leader[2]["gather_generation_logits"] == "True"
    assert leader[3] == "shut down"


def test_a_picture_that_nobody_loads_ends_the_engine(engine):
    engine.submit(ask("r", [picture(1)], context=CONTEXT)[0])
    with pytest.raises(ValueError, match=r"^picture 0 of r is not at hand$"):
        engine.step()


def test_a_plan_that_is_none_is_refused(built, tmp_path):
    plan = tmp_path / "vision.engine"
    plan.write_bytes(b"of another kind")
    with pytest.raises(errors.EngineIncompatibleError) as caught:
        vision.Tower(plan, dtype="float32", hidden_size=built[1].language.hidden_size)
    assert caught.value.message == "TensorRT can not read vision.engine"
    assert caught.value.remedy == (
        "serve on the kind of GPU and with the image that the engine was built for, or build it "
        "again"
    )


def test_a_tower_that_can_not_run_is_told(built, monkeypatch):
    import tensorrt

    plan, hidden_size = built[2] / "vision.engine", built[1].language.hidden_size
    tower = vision.Tower(plan, dtype="float32", hidden_size=hidden_size)
    assert tower.most_tiles == LIMITS.max_tiles_per_request
    monkeypatch.setattr(tensorrt.IExecutionContext, "execute_async_v3", lambda *_: False)
    with pytest.raises(errors.EngineUnavailableError) as failed:
        tower.encode(picture(1))
    assert str(failed.value) == "the vision engine failed; the log says why"
    monkeypatch.setattr(tensorrt.ICudaEngine, "create_execution_context", lambda *_: None)
    with pytest.raises(errors.EngineIncompatibleError) as refused:
        vision.Tower(plan, dtype="float32", hidden_size=hidden_size)
    assert refused.value.message == (
        "TensorRT makes no execution context: as a rule memory is short"
    )


def test_a_cache_for_less_than_a_sequence_is_refused(built):
    with pytest.raises(errors.StageError, match="tokens needs 2097152") as caught:
        loading.load_engine(built[2], LIMITS, picture_cache_bytes=2**28, kv_cache_bytes=2**20)
    assert caught.value.reason is errors.Reason.OUT_OF_GPU_MEMORY


def test_more_top_k_than_the_executor_takes_is_refused(engine):
    sampling = interface.Sampling(max_tokens=1, top_k=1025)
    with pytest.raises(errors.RequestError, match="at most 1024"):
        list(stepping.answer(engine, *ask("r", [[5]], context=CONTEXT, sampling=sampling)))


def answers_with_fault(engine, fault):
    """Answers, errors and reports of four requests of which one meets a fault in flight."""
    asked = [ask(f"r{n}", [[5 + n] * 40], context=CONTEXT, max_tokens=30) for n in range(4)]
    for request, tiles in asked:
        engine.submit(request, tiles)
    steps = run(engine, lambda steps: len(steps) >= 8)
    engine._executor.fail_next(fault)
    steps += run(engine, lambda more: ended(4)(steps + more))
    answers, failed = {}, {}
    for step in steps:
        answers.setdefault(step.request_id, []).extend(step.token_ids)
        if step.error:
            failed[step.request_id] = str(step.error)
    return asked, answers, failed


@pytest.mark.parametrize("fault", ["error", "timed_out", "cancelled"])
def test_an_answer_that_the_executor_gives_up_fails_alone(engine, alone, fault):
    asked, answers, failed = answers_with_fault(engine, fault)

    (message,) = failed.values()
    assert message == "this request failed; the server's log says why"
    for request, tiles in asked:
        if request.request_id not in failed:
            assert answers[request.request_id] == answer_alone(alone, request, tiles)[0]
    assert not engine.has_work


def test_a_paused_answer_goes_on_with_the_same_tokens(engine, alone):
    asked, answers, failed = answers_with_fault(engine, "paused")

    assert not failed
    for request, tiles in asked:
        assert answers[request.request_id] == answer_alone(alone, request, tiles)[0]
    run(engine, lambda _: not engine.is_busy)
    assert engine.take_reports()[-1].preemptions == 1


def test_a_dead_executor_ends_the_worker(built):
    loaded = loading.load_engine(built[2], LIMITS, picture_cache_bytes=2**28)
    request, tiles = ask("r", [[5] * 40], context=CONTEXT, max_tokens=30)
    loaded.submit(request, tiles)
    run(loaded, lambda steps: len(steps) >= 2)
    loaded._executor.fail_next("dead")
    with pytest.raises(RuntimeError, match="illegal memory access"):
        run(loaded, lambda _: False)
    with pytest.raises(RuntimeError):
        loaded.close()
