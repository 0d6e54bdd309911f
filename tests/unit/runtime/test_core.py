"""The engine's rules for pictures and for short memory, with a model that only counts."""

import types

import numpy as np
import pytest
import torch
from internvl_runtime import errors
from internvl_runtime.engine import gallery, interface, stepping
from internvl_runtime.engine.pytorch import (
    block_pool,
    core,
    runner,
    sampler,
    scheduler,
)
from internvl_runtime.model import config, prompt

TOKENS_PER_TILE = config.TOKENS_PER_TILE


class Model:
    """Stands for a runner: chooses token 1, and runs out of memory beyond `most` tokens."""

    def __init__(self, most=10**9):
        self.model = types.SimpleNamespace(device=torch.device("cpu"))
        self.most = most
        self.tiles_per_pass = self.most_tiles_per_pass = 8
        self.tower_passes = self.tiles_encoded = 0
        self.feature_bytes_per_tile = 1

    def encode(self, pictures):
        tiles = sum(map(len, pictures.values()))
        self.tower_passes += -(-tiles // self.tiles_per_pass)
        self.tiles_encoded += tiles
        for content_hash, own in pictures.items():
            yield content_hash, torch.zeros(len(own), dtype=torch.uint8)

    def launch(self, step, rows, features):
        if step.tokens > self.most:
            raise MemoryError
        for chunk in step.chunks:
            for placement, content_hash in chunk.sequence.pictures:
                if placement.offset < chunk.end and chunk.start < placement.offset + 1:
                    features.features(content_hash)
        chunks = tuple(chunk for chunk in step.chunks if chunk.chooses)
        chosen = sampler.Chosen(torch.ones(len(chunks), dtype=torch.long))
        return runner.Launched(chunks, tuple(rows), chosen)


class Setting:
    """An engine, and what it has asked for."""

    def __init__(self, *, tokens=8192, blocks=2000, waiting=64, feature_bytes=10**6, most=10**9):
        self.asked = []
        self.engine = core.Engine(
            Model(most),
            scheduler.Limits(max_batch_size=8, max_batched_tokens=tokens),
            block_pool.BlockPool(blocks),
            gallery.Gallery(max_feature_bytes=feature_bytes, max_waiting_tiles=waiting),
            load=lambda request_id, index: self.asked.append((request_id, index)),
            lag=0,
            max_sequence_tokens=30_000,
        )

    def submit(self, name, pictures, *, max_tokens=2, **rest):
        """Pictures by content hash, with their tiles."""
        ids, placements = [5], []
        for index, tiles in enumerate(pictures.values()):
            length = tiles * TOKENS_PER_TILE
            placements.append(prompt.ImagePlacement(index, len(ids), length))
            ids += [9] * length
        self.engine.submit(
            stepping.Submitted(
                request_id=name,
                prompt=prompt.Prompt((*ids, 7), tuple(placements)),
                content_hashes=list(pictures),
                sampling=interface.Sampling(max_tokens=max_tokens, temperature=0.0),
                stop_token_ids=frozenset(),
            ),
            **rest,
        )

    def answer_asks(self, sizes):
        """Send what was asked for; `sizes` has the tiles of each picture."""
        asked, self.asked = self.asked, []
        for request_id, index in asked:
            answer = self.engine._answers.get(request_id)
            if answer:
                content_hash = answer.request.content_hashes[index]
                self.engine.put_tiles(content_hash, tiles_of(sizes[content_hash]))

    def run(self, sizes, limit=2000):
        ended = {}
        for _ in range(limit):
            for step in self.engine.step():
                if step.is_last:
                    ended[step.request_id] = step.error
            self.answer_asks(sizes)
            if not self.engine.has_work:
                return ended
        raise AssertionError(f"only {sorted(ended)} ended")


def tiles_of(count):
    return np.broadcast_to(np.uint8(0), (count, 448, 448, 3))


def test_a_prompt_beyond_the_sequence_is_refused_and_does_not_wait_for_room():
    setting = Setting()
    setting.submit("r", {"a": 120})
    (step,) = setting.engine.step()
    assert str(step.error) == (
        "30722 prompt tokens and an answer, the engine was built for 30000: shorten the prompt"
    )
    assert not setting.engine.has_work


def test_a_picture_is_asked_for_again_when_its_first_asker_is_gone():
    setting = Setting()
    setting.submit("first", {"p": 1})
    setting.submit("second", {"p": 1})
    setting.engine.step()
    assert setting.asked == [("first", 0)]
    setting.engine.cancel("first")
    assert setting.run({"p": 1}) == {"second": None}


def test_a_failure_of_a_load_that_nobody_waits_for_harms_nobody():
    setting = Setting()
    setting.submit("first", {"p": 1})
    setting.engine.step()
    setting.engine.cancel("first")
    setting.submit("second", {"p": 1})
    setting.engine.step()
    setting.answer_asks({"p": 1})
    setting.engine.fail_picture("p", errors.RequestError("broken"))
    assert setting.run({"p": 1}) == {"second": None}


def test_a_picture_that_can_not_be_loaded_ends_everyone_who_needs_it():
    setting = Setting()
    for name in ("first", "second"):
        setting.submit(name, {"p": 1})
    setting.submit("text", {})
    setting.engine.step()
    setting.engine.fail_picture("p", errors.RequestError("broken"))
    ended = setting.run({})
    assert [str(ended[name]) for name in ("first", "second")] == ["broken", "broken"]
    assert ended["text"] is None


def test_one_request_may_have_more_tiles_than_may_wait():
    setting = Setting(waiting=16)
    sizes = {"a": 12, "b": 12, "c": 12}
    setting.submit("large", sizes)
    assert setting.run(sizes) == {"large": None}


def test_two_requests_that_each_hold_half_of_the_tiles_both_end():
    setting = Setting(waiting=8)
    sizes = {"a": 4, "b": 4, "c": 4, "d": 4}
    for name, own in (("first", "ab"), ("second", "cd")):
        at_hand = own[0]
        pictures = {each: sizes[each] for each in own}
        setting.submit(name, pictures, tiles={at_hand: tiles_of(4)})
    assert set(setting.run(sizes)) == {"first", "second"}


def test_small_requests_do_not_starve_a_large_one():
    setting = Setting(waiting=16, tokens=4000)
    sizes = {"large": 14} | {f"s{n}": 4 for n in range(300)}
    for number in range(4):
        setting.submit(f"r{number}", {f"s{number}": 4}, max_tokens=1)
    setting.submit("large", {"large": 14})
    later = 0
    for number in range(4, 300):
        setting.submit(f"r{number}", {f"s{number}": 4}, max_tokens=1)
        ended = [step.request_id for step in setting.engine.step() if step.is_last]
        setting.answer_asks(sizes)
        if "large" in ended:
            break
        later += len(ended)
    assert later < 20


def test_short_memory_keeps_the_features_of_everyone_who_runs():
    setting = Setting(tokens=4000, most=600)
    sizes = {"a": 4, "b": 3}
    for name, size in sizes.items():
        setting.submit(name, {name: size}, tiles={name: tiles_of(size)})
    assert setting.run(sizes) == {"a": None, "b": None}
    assert setting.engine.runner.tiles_encoded == 7


@pytest.mark.parametrize("feature_bytes", [10**6, 10])
def test_waiting_tiles_share_passes_also_when_the_cache_is_full(feature_bytes):
    setting = Setting(feature_bytes=feature_bytes, tokens=300)
    for number in range(10):
        setting.submit(f"old{number}", {f"o{number}": 1}, tiles={f"o{number}": tiles_of(1)})
        setting.run({})
    before = setting.engine.runner.tower_passes
    for number in range(4):
        setting.submit(f"r{number}", {f"p{number}": 1}, tiles={f"p{number}": tiles_of(1)})
    setting.run({})
    assert setting.engine.runner.tower_passes == before + 1


def test_a_picture_counts_as_found_where_no_pass_was_for_its_request():
    setting = Setting(feature_bytes=2)

    def ask(name, pictures):
        setting.submit(name, pictures)
        assert setting.run(pictures) == {name: None}
        return setting.engine.pictures.hits, setting.engine.pictures.lookups

    assert ask("new", {"p": 1}) == (0, 1)
    assert ask("in the key/value cache", {"p": 1}) == (1, 2)
    assert ask("evicts p", {"q": 2}) == (1, 3)
    setting.engine.scheduler.pool.clear()
    assert ask("to be encoded again", {"p": 1}) == (1, 4)
    setting.engine.scheduler.pool.clear()
    assert ask("among the features", {"p": 1}) == (2, 5)


def test_waiting_pictures_that_share_a_pass_count_as_not_found():
    setting = Setting(tokens=300)
    for name in "pq":
        setting.submit(name, {name: 1})
    setting.run({"p": 1, "q": 1})
    pictures, model = setting.engine.pictures, setting.engine.runner
    assert (model.tower_passes, pictures.hits, pictures.lookups) == (1, 0, 2)


def test_a_load_that_fails_harms_nobody_whose_picture_is_computed():
    setting = Setting(feature_bytes=0)
    setting.submit("runs", {"p": 1}, max_tokens=8)
    setting.engine.step()
    setting.answer_asks({"p": 1})
    setting.engine.step()
    setting.engine.pictures.shrink(0, needed=())
    setting.submit("waits", {"q": 1, "p": 1})
    setting.engine.step()
    setting.engine.fail_picture("p", errors.RequestError("broken"))
    ended = setting.run({"p": 1, "q": 1})
    assert ended["runs"] is None
    assert ended["waits"].message == "broken"


def test_steps_are_large_again_once_a_request_too_large_for_memory_is_gone():
    setting = Setting(tokens=4096, most=0)
    setting.submit("never fits", {})
    assert setting.run({})["never fits"] is not None
    assert setting.engine.scheduler.budget == 4096
    assert setting.engine.runner.tiles_per_pass == 8


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_every_error_of_short_memory_is_known(error):
    setting = Setting()
    launch, setting.engine.runner.launch = setting.engine.runner.launch, raising(error)
    setting.submit("late", {})
    setting.engine.step()
    setting.engine.runner.launch = launch
    assert setting.run({}) == {"late": None}


def raising(error):
    def launch(step, rows, features):
        raise error

    return launch


def test_a_lost_rank_is_no_request_s_failure():
    setting = Setting()

    def launch(step, rows, features):
        raise errors.RankLostError

    setting.engine.runner.launch = launch
    setting.submit("one", {})
    with pytest.raises(errors.RankLostError):
        setting.engine.step()
