import hashlib
import io
import random

import data
import numpy as np
import PIL.Image
import pytest
import random_pictures
import tile_oracle
from internvl_runtime import errors
from internvl_runtime.vision import picture, tiles
from internvl_runtime.vision.grid import choose_grid
from pictures import draw

PIXELS = 10**8
DRAWN = [
    (448, 448, 1, "f08a9f6eca6df08c6326a37bd122cb14"),
    (640, 480, 13, "6b4c1e4d07c91d92281dbb898722ac7b"),
    (480, 640, 13, "900c568d8f58f16ed56302e0f1a7af72"),
    (1280, 720, 9, "1a3ccdd9de2f61fd6f43b5fcf0b26d27"),
    (1920, 1080, 9, "46a52018d3b05da4b92e5be8e8643c39"),
    (448, 384, 13, "e1b632ea6e6cd39c5fdf5715526da422"),
    (1, 1, 1, "ad8c5f4d30e45b2a50f7f4d1f347f64d"),
]
FILES = [
    ("image1.jpg", 12, 13, "e43ede5b77db39acb5149b4c13f55334"),
    ("frame_0.jpg", 12, 3, "3f95439d47aa2e0fa99cc627e743a2fe"),
    ("frame_0.jpg", 1, 1, "fb40b91360561427c4fe81b1b13ff28e"),
]


def digest(array):
    return hashlib.sha256(array.tobytes()).hexdigest()[:32]


@pytest.mark.parametrize(("width", "height", "count", "expected"), DRAWN)
def test_drawn_pictures_give_the_golden_tiles(width, height, count, expected):
    cut = tiles.cut_tiles(draw(width, height), choose_grid(width, height, max_tiles=12))

    assert cut.shape == (count, 448, 448, 3)
    assert digest(cut) == expected


@pytest.mark.parametrize(("name", "limit", "count", "expected"), FILES)
def test_files_give_the_golden_tiles(name, limit, count, expected):
    path = data.require(f"images/{name}")
    opened = picture.open_picture(path.read_bytes(), max_tiles=limit, max_pixels=PIXELS)

    assert opened.grid.tiles == count
    assert digest(opened.load()) == expected


@pytest.mark.parametrize("content", [b"", b"hello", b"\x89PNG\r\n\x1a\n" + b"0" * 40], ids=repr)
def test_bytes_that_are_no_picture_are_refused(content):
    with pytest.raises(errors.RequestError, match="can not be read"):
        picture.open_picture(content, max_tiles=12, max_pixels=PIXELS).load()


def test_a_picture_that_is_cut_short_is_refused(tmp_path):
    draw(300, 200).save(tmp_path / "whole.jpg")
    cut = (tmp_path / "whole.jpg").read_bytes()[:2000]
    opened = picture.open_picture(cut, max_tiles=12, max_pixels=PIXELS)

    with pytest.raises(errors.RequestError, match="truncated"):
        opened.load()


def test_a_picture_of_too_many_pixels_is_refused_undecoded(tmp_path):
    draw(300, 200).save(tmp_path / "picture.png")
    content = (tmp_path / "picture.png").read_bytes()

    with pytest.raises(errors.RequestError, match=r"300 x 200 pixels; at most 59999"):
        picture.open_picture(content, max_tiles=12, max_pixels=59_999)


def test_the_content_hash_depends_on_bytes_and_tile_limit(tmp_path):
    draw(30, 20).save(tmp_path / "picture.png")
    content = (tmp_path / "picture.png").read_bytes()

    def content_hash(limit):
        return picture.open_picture(content, max_tiles=limit, max_pixels=PIXELS).content_hash

    assert content_hash(12) == content_hash(12)
    assert content_hash(12) != content_hash(6)


def test_500_random_pictures_give_the_oracles_tiles():
    check_random_pictures(seed=13, count=500, largest=2048)


@pytest.mark.long
def test_10_000_random_pictures_to_8192_give_the_oracles_tiles():
    check_random_pictures(seed=17, count=10_000, largest=8192)


def check_random_pictures(*, seed, count, largest):
    rng = random.Random(seed)
    for _ in range(count):
        content, described = random_pictures.draw(rng, largest=largest)
        limit = rng.choice((1, 6, 12, 12))
        opened = picture.open_picture(content, max_tiles=limit, max_pixels=PIXELS)
        pixels = np.asarray(PIL.Image.open(io.BytesIO(content)).convert("RGB"))
        columns, rows = tile_oracle.grid_of(*pixels.shape[1::-1], limit)
        expected = tile_oracle.tiles_of(pixels, columns, rows)
        assert np.array_equal(opened.load(), expected), f"{described}, {limit} tiles"


MODES = [
    (PIL.Image.new("RGBA", (2, 1), (10, 20, 30, 0)), (10, 20, 30)),
    (PIL.Image.new("LA", (2, 1), (7, 0)), (7, 7, 7)),
    (PIL.Image.new("CMYK", (2, 1), (0, 255, 255, 0)), (255, 0, 0)),
    (PIL.Image.new("1", (2, 1), 1), (255, 255, 255)),
    (PIL.Image.fromarray(np.full((1, 2), 4000, np.uint16)), (255, 255, 255)),
]


@pytest.mark.parametrize(("source", "colour"), MODES, ids=lambda value: getattr(value, "mode", ""))
def test_modes_become_rgb_as_convert_gives_them(source, colour):
    buffer = io.BytesIO()
    source.save(buffer, format="TIFF")
    opened = picture.open_picture(buffer.getvalue(), max_tiles=1, max_pixels=PIXELS)
    assert opened.load()[0, 0, 0].tolist() == list(colour)


def test_the_first_picture_of_a_gif_counts():
    buffer = io.BytesIO()
    first, second = (PIL.Image.new("RGB", (4, 4), colour) for colour in ("red", "blue"))
    first.save(buffer, format="GIF", save_all=True, append_images=[second])
    opened = picture.open_picture(buffer.getvalue(), max_tiles=1, max_pixels=PIXELS)
    assert opened.load()[0, 0, 0].tolist() == [255, 0, 0]


def test_the_orientation_in_exif_is_not_applied():
    buffer = io.BytesIO()
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    draw(200, 100).save(buffer, format="JPEG", exif=exif)
    opened = picture.open_picture(buffer.getvalue(), max_tiles=12, max_pixels=PIXELS)
    assert (opened.width, opened.height) == (200, 100)
