from pathlib import Path

import numpy as np
import pytest
import torch
from internvl_runtime import errors
from internvl_runtime.engine import channel, folder, interface
from internvl_runtime.engine.pytorch import attention, vision
from internvl_runtime.model import prompt

FLAGS = {
    "maxBatchSize": 1, "maxSequenceTokens": 512, "maxInputTokens": 511, "maxBatchedTokens": 256,
    "maxTilesPerImage": 12, "maxTilesPerRequest": 52,
}  # fmt: skip


@pytest.mark.parametrize(
    "message",
    [
        channel.Submit(
            request_id="r", token_ids=(1, 2), placements=(prompt.ImagePlacement(0, 1, 256),),
            content_hashes=("a",), stop_token_ids=frozenset({2}), priority=-1,
            sampling=interface.Sampling(max_tokens=3, logit_bias=((4, -1.5),), seed=2**62),
            constraint=interface.Constraint(interface.ConstraintKind.JSON_SCHEMA, "{}"),
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


def test_tiles_travel_as_memory_without_a_name(tmp_path):
    tiles = np.arange(24, dtype=np.uint8).reshape(2, 2, 2, 3)
    with channel.listen_for_tiles(tmp_path / "s") as listening:
        worker = channel.connect_for_tiles(tmp_path / "s")
        server, _ = listening.accept()
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    channel.send_tiles(server, "hash", tiles)
    name, received = channel.receive_tiles(worker, (2, 2, 3))
    assert name == "hash"
    assert np.array_equal(received, tiles)
    assert len(list(Path("/proc/self/fd").iterdir())) == descriptors
    server.close()
    assert channel.receive_tiles(worker, (2, 2, 3)) is None
    worker.close()


def test_pixel_shuffle_puts_the_four_neighbours_into_channels():
    hidden = torch.arange(1024.0).view(1, 1024, 1)
    shuffled = vision.pixel_shuffle(hidden)
    assert shuffled.shape == (1, 256, 4)
    assert shuffled[0, 17].tolist() == [66, 67, 98, 99]


def test_a_chunk_sees_the_past_and_its_own_beginning():
    mask = attention.causal_mask(past=2, new=2)
    assert mask.tolist() == [[True, True, True, False], [True] * 4]
    assert attention.causal_mask(past=5, new=1) is None


def test_build_flags_survive_a_round_trip():
    assert folder.flags_of(folder.limits_of(FLAGS)) == FLAGS


def test_unknown_build_flags_are_refused():
    with pytest.raises(errors.StageError, match="build flags"):
        folder.limits_of({**FLAGS, "beams": 4})
