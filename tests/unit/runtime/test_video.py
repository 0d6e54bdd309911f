import io

import av
import numpy as np
import PIL.Image
import pytest
from internvl_runtime import errors
from internvl_runtime.vision import tiles, video
from internvl_runtime.vision.grid import Grid
from pictures import film

LIMITS = video.VideoLimits(max_pixels=10**6, seconds=30.0)


# By the formula of the model card, worked out by hand: last = count - 1, seg = last / frames,
# int(seg / 2 + round(seg * k)), round half to even.
INDICES = [
    (9, 4, [1, 3, 5, 7]),
    (17, 8, [1, 3, 5, 7, 9, 11, 13, 15]),
    (11, 4, [1, 3, 6, 9]),
    (1, 3, [0, 0, 0]),
    (3, 4, [0, 0, 1, 2]),
    (100, 1, [49]),
]


@pytest.mark.parametrize(("count", "frames", "expected"), INDICES)
def test_segments_are_sampled_as_on_the_model_card(count, frames, expected):
    assert video.frame_indices(count, frames) == expected


@pytest.mark.parametrize(
    ("codec", "kind"), [("libx264", "mp4"), ("libvpx", "webm"), ("mpeg4", "avi")]
)
async def test_frames_are_those_of_the_segments(codec, kind):
    shown = await video.read_frames(film(17, codec=codec, kind=kind), frames=8, limits=LIMITS)

    means = [frame.load().mean() for frame in shown]
    assert [frame.load().shape for frame in shown] == [(1, 448, 448, 3)] * 8
    assert means == pytest.approx([5 * n for n in (1, 3, 5, 7, 9, 11, 13, 15)], abs=4)
    assert (shown[0].width, shown[0].height, shown[0].grid.tiles) == (64, 48, 1)


async def test_a_frames_tile_is_that_of_its_picture():
    content = film(3)
    with av.open(io.BytesIO(content)) as container:
        first = next(container.decode(video=0)).to_image()
    (shown,) = await video.read_frames(content, frames=1, limits=LIMITS)
    with av.open(io.BytesIO(content)) as container:
        pictures = [frame.to_image() for frame in container.decode(video=0)]
    assert isinstance(first, PIL.Image.Image)
    assert np.array_equal(shown.load(), tiles.cut_tiles(pictures[1], Grid(1, 1)))


@pytest.mark.parametrize(
    "content",
    [b"", b"hello", film(5)[:400], b"#EXTM3U\nhttp://127.0.0.1/x.ts\n", b"ffconcat version 1.0\n"],
    ids=["nothing", "text", "cut short", "playlist", "concatenation"],
)
async def test_what_is_no_video_is_refused(content):
    with pytest.raises(errors.RequestError, match="video:"):
        await video.read_frames(content, frames=2, limits=LIMITS)


async def test_too_large_frames_are_refused_by_their_number():
    limits = video.VideoLimits(max_pixels=1000, seconds=30.0)
    with pytest.raises(errors.RequestError, match=r"64 x 48 pixels, at most 1000"):
        await video.read_frames(film(2), frames=1, limits=limits)


async def test_decoding_that_takes_too_long_is_ended():
    limits = video.VideoLimits(max_pixels=10**6, seconds=0.01)
    with pytest.raises(errors.RequestError, match="longer than"):
        await video.read_frames(film(2), frames=1, limits=limits)
