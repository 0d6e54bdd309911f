"""What the engine keeps of its requests, over an executor that says what the test lets it."""

import logging
import threading
import types
import weakref

import numpy as np
import pytest
import torch
from internvl_doubles import executor as module
from internvl_runtime import errors
from internvl_runtime.engine import gallery, interface, stepping
from internvl_runtime.engine.tensorrt import built as builts
from internvl_runtime.engine.tensorrt import core
from internvl_runtime.model import prompt

BUILT = builts.Built(
    dtype="float32", vocab_size=512, hidden_size=4, bytes_per_token=64, max_batch_size=1,
    max_sequence_tokens=2048, rows_per_request=1024, tokens_per_block=32, ranks=1,
)  # fmt: skip
WORDS = "this request failed; the server's log says why"
TILE_BYTES = 256 * 4 * 4
"""Of a tile's features."""


class Executor:
    def __init__(self):
        self.requests, self.cancelled, self.responses, self.statistics = [], [], [], []
        self.refuses = self.is_shut_down = False

    def enqueue_request(self, request):
        if self.refuses:
            raise RuntimeError("out of order")
        self.requests.append(request)
        return len(self.requests)

    def cancel_request(self, id):  # noqa: A002 - the published name
        self.cancelled.append(id)

    def await_responses(self, timeout):
        assert 0 < timeout.total_seconds() < 1
        responses, self.responses = self.responses, []
        return responses

    def get_latest_iteration_stats(self):
        statistics, self.statistics = self.statistics, []
        return statistics

    def shutdown(self):
        self.is_shut_down = True

    def tell(self, number, token_ids=(7,), reason="NOT_FINISHED", *, reused=None, logits=None):
        is_over = reason != "NOT_FINISHED"
        metrics = types.SimpleNamespace(num_reused_blocks=reused)
        result = module.Result(
            is_final=is_over, output_token_ids=[list(token_ids)], log_probs=[[-1.0]],
            finish_reasons=[module.FinishReason[reason]], generation_logits=logits,
            request_perf_metrics=None if reused is None
            else types.SimpleNamespace(kv_cache_metrics=metrics),
        )  # fmt: skip
        self.responses.append(module.Response(number, result=result))

    def tell_statistics(self, decodes, prompt_tokens=0):
        self.statistics.append(
            module.IterationStats(
                iter_latency_ms=500.0,
                kv_cache_stats=module.KvCacheStats(
                    max_num_blocks=90, used_num_blocks=8, tokens_per_block=32, reused_blocks=3,
                    missed_blocks=5,
                ),
                inflight_batching_stats=module.InflightBatchingStats(
                    num_gen_requests=decodes, num_paused_requests=0, num_ctx_tokens=prompt_tokens
                ),
            )
        )  # fmt: skip


class Tower:
    most_tiles = 4

    def __init__(self):
        self.passes = []

    def encode(self, tiles):
        self.passes.append(len(tiles))
        return torch.ones(len(tiles), 256, 4)


class Setting:
    """An engine on a clock that stands still, and what it has asked for."""

    def __init__(self, *, max_feature_bytes=2**20, max_waiting_tiles=8, tells_logits=False):
        self.now = 100.0
        self.executor, self.tower, self.asked = Executor(), Tower(), []
        self.gallery = gallery.Gallery(
            max_feature_bytes=max_feature_bytes, max_waiting_tiles=max_waiting_tiles
        )
        self.engine = core.Engine(
            module, self.executor, BUILT, self.tower, self.gallery,
            load=lambda name, index: self.asked.append((name, index)),
            **({"tells_logits": True} if tells_logits else {}), clock=lambda: self.now,
        )  # fmt: skip

    def submit(self, name, pictures="", *, tiles=1, at_hand=False, priority=0, **sampling):
        """Submit a request whose pictures are letters."""
        placements = [prompt.ImagePlacement(n, 256 * tiles * n, 256 * tiles)
                      for n in range(len(pictures))]  # fmt: skip
        self.engine.submit(
            stepping.Submitted(
                request_id=name,
                prompt=prompt.Prompt((5,) * (256 * tiles * len(pictures) + 3), tuple(placements)),
                content_hashes=list(pictures),
                sampling=interface.Sampling(**{"max_tokens": 8, "temperature": 0.0, **sampling}),
                stop_token_ids=frozenset(),
                priority=priority,
            ),
            {each: noise(tiles) for each in pictures} if at_hand else None,
        )

    def step(self):
        return self.engine.step()

    def step_until_encoded(self, name):
        while not self.gallery.is_encoded(name):
            self.step()
        return self.step()


def noise(tiles):
    return np.zeros((tiles, 448, 448, 3), np.uint8)


@pytest.fixture
def setting():
    made = Setting()
    yield made
    made.engine.close()


def failures(steps):
    return {step.request_id: str(step.error) for step in steps if step.error}


def enqueue_with_table(setting):
    """Hand a request over; returns a weak reference of its table, which the executor copies."""
    setting.submit("r", "a", at_hand=True)
    setting.step_until_encoded("a")
    return weakref.ref(setting.executor.requests.pop().prompt_tuning_config.embedding_table)


def test_a_table_is_kept_until_its_first_response(setting):
    table = enqueue_with_table(setting)
    setting.step()
    assert table() is not None
    setting.executor.tell(1)
    setting.step()
    assert table() is None


def test_a_cancelled_request_s_table_is_kept_until_its_last_response(setting):
    table = enqueue_with_table(setting)
    setting.engine.cancel("r")
    assert setting.step() == []
    assert table() is not None
    assert setting.engine.is_busy
    assert not setting.engine.has_work
    setting.executor.tell(1, (), "CANCELLED")
    assert setting.step() == []
    assert table() is None
    assert not setting.engine.is_busy


def test_what_the_executor_refuses_fails_alone_and_is_logged(setting, caplog):
    setting.executor.refuses = True
    setting.submit("r")
    steps = setting.step()
    assert failures(steps) == {"r": WORDS}
    assert caplog.messages == ["the executor refuses r"]
    assert not setting.engine.has_work
    setting.executor.refuses = False
    setting.submit("next")
    setting.step()
    assert setting.engine.load().running == 1


def test_what_is_beyond_the_engine_is_refused_by_its_name(setting):
    setting.submit("r", "abcde")
    (step,) = setting.step()
    assert step.request_id == "r"
    assert isinstance(step.error, errors.RequestError)
    assert "1280 image tokens, the engine was built for 1024" in step.error.message
    assert setting.executor.requests == []


def test_requests_of_one_priority_are_queued_as_they_came(setting):
    for number in range(6):
        setting.submit(f"r{number}", max_tokens=10 + number)
    setting.submit("urgent", max_tokens=99, priority=-1)
    setting.step()
    # One of the batch, and two at hand.
    assert [each.max_tokens for each in setting.executor.requests] == [99, 10, 11]
    setting.executor.tell(1, reason="LENGTH")
    setting.step()
    setting.step()
    assert [each.max_tokens for each in setting.executor.requests] == [99, 10, 11, 12]
    assert setting.engine.load().waiting == 3


def test_a_start_is_told_once_with_blocks_and_seconds(setting):
    setting.submit("r", "a")
    setting.step()
    setting.engine.put_tiles("a", noise(1))
    setting.now += 2.5
    setting.step_until_encoded("a")
    setting.now += 4
    setting.executor.tell(1)
    setting.executor.tell(1, reused=3)
    setting.executor.tell(1, reused=3)
    setting.executor.tell(1, reason="LENGTH", reused=3)
    starts = [step.start for step in setting.step()]
    assert starts == [None, interface.Start(cached_tokens=96, queued_seconds=2.5), None, None]


def test_a_start_without_figures_is_told_at_the_end(setting):
    setting.submit("r")
    setting.step()
    setting.executor.tell(1)
    setting.executor.tell(1, reason="LENGTH")
    starts = [step.start for step in setting.step()]
    assert starts == [None, interface.Start(cached_tokens=0, queued_seconds=0.0)]


def test_an_answer_of_a_build_has_logits_where_they_are_asked_for():
    setting = Setting(tells_logits=True)
    setting.submit("with", log_probabilities=2)
    setting.submit("chosen", log_probabilities=0)
    setting.submit("without")
    setting.step()
    wanted = [each.output_config.return_generation_logits for each in setting.executor.requests]
    assert wanted == [True, False, False]
    logits = torch.zeros(1, 1, 600)
    logits[0, 0, 7], logits[0, 0, 555] = 3.0, 9.0
    for number in (1, 2, 3):
        setting.executor.tell(number, reason="LENGTH", logits=logits if number == 1 else None)
    told = [step.log_probabilities for step in setting.step()]
    setting.engine.close()

    # What the executor pads the vocabulary with is none of it.
    assert [token for token, _ in told[0][0].top] == [7, 0]
    assert told[1] == (interface.TokenLogProbabilities(chosen=-1.0, top=()),)
    assert told[2] == ()


def test_a_server_is_told_no_logits(setting):
    setting.submit("r", log_probabilities=2)
    setting.step()
    assert setting.executor.requests[0].output_config.return_generation_logits is False
    setting.executor.tell(1, reason="LENGTH")
    (step,) = setting.step()
    assert step.log_probabilities == (interface.TokenLogProbabilities(chosen=-1.0, top=()),)


def test_an_end_that_is_none_of_ours_fails_alone_and_is_logged(setting, caplog):
    for name in ("timed", "failed", "fine"):
        setting.submit(name)
    setting.step()
    setting.executor.tell(1, reason="TIMED_OUT")
    setting.executor.responses.append(module.Response(2, error_msg="no blocks"))
    setting.executor.tell(3, reason="STOP_WORDS")
    steps = setting.step()
    assert failures(steps) == {"timed": WORDS, "failed": WORDS}
    assert steps[2].finish_reason is interface.FinishReason.STOP
    assert caplog.messages == [
        "the executor ended timed: FinishReason.TIMED_OUT",
        "the executor gave failed up: no blocks",
    ]
    assert not setting.engine.has_work


def test_what_was_cancelled_is_heard_no_more(setting):
    setting.submit("r")
    setting.submit("other")
    setting.step()
    setting.engine.cancel("r")
    setting.engine.cancel("r")
    setting.engine.cancel("unknown")
    assert setting.executor.cancelled == [1]
    setting.executor.tell(1, reason="CANCELLED", token_ids=())
    setting.executor.tell(2)
    assert [step.request_id for step in setting.step()] == ["other"]


def test_an_end_cancels_what_runs(setting):
    setting.submit("a")
    setting.submit("b")
    setting.step()
    setting.engine.close()
    assert setting.executor.cancelled == [1, 2]
    assert setting.executor.is_shut_down


def test_silence_is_measured_while_something_runs(setting):
    assert setting.engine.silent_seconds == 0
    setting.submit("a")
    setting.now += 50
    setting.step()
    assert setting.engine.silent_seconds == 0
    setting.now += 3
    setting.submit("b")
    setting.step()
    assert setting.engine.silent_seconds == 3
    setting.executor.tell(1)
    setting.step()
    assert setting.engine.silent_seconds == 0
    setting.now += 4
    setting.executor.tell_statistics(1)
    setting.step()
    assert setting.engine.silent_seconds == 0
    setting.now += 5
    setting.executor.tell(1, reason="LENGTH")
    setting.executor.tell(2, reason="LENGTH")
    setting.step()
    setting.now += 6
    assert setting.engine.silent_seconds == 0


def test_the_vision_engine_is_silent_from_its_own_begin(setting):
    going_on = threading.Event()
    encode = setting.tower.encode
    setting.tower.encode = lambda tiles: going_on.wait() and encode(tiles)
    setting.submit("r", "a", at_hand=True)
    setting.now += 9
    setting.step()
    assert setting.engine.is_busy
    setting.now += 2
    assert setting.engine.silent_seconds == 2
    # What the executor says beside it is no sign of it.
    setting.submit("text")
    setting.step()
    setting.now += 3
    setting.executor.tell(1)
    setting.step()
    assert setting.engine.silent_seconds == 5
    going_on.set()
    setting.step_until_encoded("a")
    assert setting.engine.silent_seconds == 0


def test_a_pass_of_the_vision_engine_is_no_sign_of_the_executor(setting):
    setting.submit("text")
    setting.step()
    setting.now += 7
    setting.submit("r", "a", at_hand=True)
    setting.step_until_encoded("a")
    assert setting.engine.silent_seconds == 7


def test_pictures_are_counted_as_looked_up_and_found(setting):
    setting.submit("first", "a", at_hand=True)
    setting.step_until_encoded("a")
    setting.submit("again", "ab")
    assert (setting.gallery.lookups, setting.gallery.hits) == (3, 2)
    setting.submit("third", "b")
    assert (setting.gallery.lookups, setting.gallery.hits) == (4, 3)
    setting.executor.tell_statistics(2, prompt_tokens=40)
    setting.step()
    (report,) = setting.engine.take_reports()
    assert (report.pictures_looked_up, report.pictures_found) == (4, 3)
    assert (report.tiles, report.tower_passes) == (1, 1)
    assert report.load == setting.engine.load()
    assert (report.prompt_tokens_looked_up, report.prompt_tokens_found) == (256, 96)
    assert setting.engine.take_reports() == []
    assert setting.engine.blocks == 90
    assert setting.engine.load() == interface.EngineLoad(
        running=1, waiting=2, blocks_used=8, picture_cache_bytes=TILE_BYTES
    )


def test_pictures_that_nobody_has_seen_are_not_found(setting):
    setting.submit("first", "a")
    setting.submit("other", "b")
    assert (setting.gallery.lookups, setting.gallery.hits) == (2, 0)


def test_an_iteration_without_tokens_is_no_step(setting):
    setting.executor.tell_statistics(0)
    setting.step()
    assert setting.engine.take_reports() == []


def test_a_reset_forgets_pictures_and_counts(setting):
    setting.submit("r", "a", at_hand=True)
    setting.step_until_encoded("a")
    setting.executor.tell(1, reason="LENGTH")
    setting.executor.tell_statistics(1)
    setting.step()
    setting.engine.reset()
    assert (setting.gallery.lookups, setting.gallery.hits) == (0, 0)
    assert setting.gallery.feature_bytes == 0
    assert setting.engine.take_reports() == []
    setting.executor.tell_statistics(1)
    setting.step()
    (report,) = setting.engine.take_reports()
    assert (report.prompt_tokens_looked_up, report.prompt_tokens_found) == (0, 0)


def test_who_needs_a_picture_of_one_that_left_asks_again(setting):
    setting.submit("a", "x")
    setting.submit("b", "x")
    setting.step()
    assert setting.asked == [("a", 0)]
    setting.engine.cancel("a")
    setting.step()
    assert setting.asked == [("a", 0), ("b", 0)]
    setting.engine.cancel("b")
    assert not setting.gallery.is_asked("x")


def test_tiles_of_one_that_left_do_not_stay(setting):
    setting.submit("a", "x", at_hand=True)
    setting.engine.cancel("a")
    assert not setting.gallery.has("x")


def test_behind_one_that_finds_no_room_nobody_asks():
    setting = Setting(max_waiting_tiles=4)
    setting.submit("first", "a", tiles=3)
    setting.submit("large", "b", tiles=2)
    setting.submit("small", "c")
    setting.step()
    assert setting.asked == [("first", 0)]
    setting.engine.put_tiles("a", noise(3))
    setting.step_until_encoded("a")
    setting.step()
    setting.engine.close()
    assert setting.asked == [("first", 0), ("large", 0), ("small", 0)]


def test_the_first_may_ask_for_more_than_there_is_room():
    setting = Setting(max_waiting_tiles=2)
    setting.submit("large", "a", tiles=3)
    setting.step()
    setting.engine.close()
    assert setting.asked == [("large", 0)]


def test_a_pass_takes_as_many_tiles_as_the_profile_and_whole_pictures():
    setting = Setting()
    setting.submit("r", "ab", tiles=2, at_hand=True)
    setting.submit("s", "c", tiles=1, at_hand=True)
    setting.step_until_encoded("c")
    setting.engine.close()
    assert setting.tower.passes == [4, 1]


def test_a_picture_that_is_in_the_pass_already_hides_none_behind_it():
    setting = Setting()
    setting.submit("r", "aab", at_hand=True)
    setting.step_until_encoded("b")
    setting.engine.close()
    assert setting.tower.passes == [2]


def test_pictures_wait_for_room_among_the_features():
    setting = Setting(max_feature_bytes=2 * TILE_BYTES)
    setting.submit("r", "a", tiles=1, at_hand=True)
    setting.submit("s", "b", tiles=1, at_hand=True)
    setting.submit("t", "c", tiles=1, at_hand=True)
    setting.step_until_encoded("a")
    setting.engine.close()
    assert setting.tower.passes[0] == 2


def test_a_failing_pass_fails_those_whose_pictures_were_in_it(setting, caplog):
    setting.tower.encode = lambda tiles: 1 / 0
    setting.submit("with", "a", at_hand=True)
    setting.submit("without")
    steps = []
    with caplog.at_level(logging.ERROR):
        while not steps:
            steps += setting.step()
    assert failures(steps) == {"with": WORDS}
    assert caplog.messages == ["the vision engine failed"]


def test_a_picture_that_can_not_be_had_fails_who_waits_for_it(setting):
    setting.submit("with", "a")
    setting.submit("other", "b")
    setting.step()
    setting.engine.fail_picture("a", errors.RequestError("it is none", parameter="messages"))
    setting.engine.fail_picture("never asked", errors.RequestError("no", parameter="messages"))
    assert failures(setting.step()) == {"with": "it is none"}
    assert setting.engine.load().waiting == 1
