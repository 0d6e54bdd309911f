import numpy as np
import pytest
import torch
from internvl_runtime import errors
from internvl_runtime.engine import channel, folder, interface, sampling
from internvl_runtime.engine.pytorch import language, vision

FLAGS = {
    "maxBatchSize": 1, "maxSequenceTokens": 512, "maxInputTokens": 511, "maxBatchedTokens": 256,
    "maxTilesPerImage": 12, "maxTilesPerRequest": 52,
}  # fmt: skip


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
    kept = sampling.probabilities_of(row, temperature=1.0, top_p=0.7)
    assert np.allclose(kept, [0.625, 0.375, 0, 0])


def test_sampling_follows_the_distribution():
    row = np.log(np.array([0.7, 0.2, 0.1], dtype=np.float32))
    free = interface.Sampling(max_tokens=1, seed=1)
    drawn = [sampling.choose(row, free, request_id="r", position=n) for n in range(20_000)]
    assert np.allclose(np.bincount(drawn) / 20_000, [0.7, 0.2, 0.1], atol=0.015)


@pytest.mark.parametrize(
    "message",
    [
        channel.Submit(
            request_id="r", token_ids=(1, 2), placements=((0, 1, 256),),
            tiles=(channel.SharedArray("n", (1, 448, 448, 3)),), stop_token_ids=frozenset({2}),
            max_tokens=3, temperature=0.5, top_p=1.0, seed=None,
        ),
        channel.Cancel("r"),
        channel.Stop(),
    ],
    ids=lambda m: type(m).__name__,
)  # fmt: skip
async def test_messages_arrive_as_they_were_sent(message):
    import asyncio

    reader = asyncio.StreamReader()
    reader.feed_data(channel.encode(message))
    assert await channel.read_to_worker(reader) == message


def test_shared_tiles_are_taken_once_and_leave_nothing():
    tiles = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    shared = channel.share(tiles)

    assert np.array_equal(channel.take(shared), tiles)
    with pytest.raises(FileNotFoundError):
        channel.take(shared)
    channel.drop(shared)


def test_pixel_shuffle_puts_the_four_neighbours_into_channels():
    hidden = torch.arange(1024.0).view(1, 1024, 1)
    shuffled = vision.pixel_shuffle(hidden)
    assert shuffled.shape == (1, 256, 4)
    assert shuffled[0, 17].tolist() == [66, 67, 98, 99]


def test_a_chunk_sees_the_past_and_its_own_beginning():
    mask = language.causal_mask(past=2, new=2)
    assert mask.tolist() == [[True, True, True, False], [True] * 4]
    assert language.causal_mask(past=5, new=1) is None


def test_build_flags_survive_a_round_trip():
    assert folder.flags_of(folder.limits_of(FLAGS)) == FLAGS


def test_unknown_build_flags_are_refused():
    with pytest.raises(errors.StageError, match="build flags"):
        folder.limits_of({**FLAGS, "beams": 4})
