"""Seeded random pictures as files: sizes, modes and formats that people send."""

import io

import numpy as np
import PIL.Image

FORMATS = {
    "RGB": ("PNG", "JPEG", "WEBP", "BMP", "TIFF"),
    "RGBA": ("PNG", "WEBP", "TIFF"),
    "L": ("PNG", "JPEG", "BMP", "TIFF"),
    "LA": ("PNG",),
    "P": ("PNG", "GIF", "BMP"),
    "1": ("PNG", "TIFF"),
    "CMYK": ("JPEG", "TIFF"),
    "I;16": ("PNG", "TIFF"),
}


def draw(rng, *, largest):
    """Return the file of a random picture, its format and its size; sizes are log-uniform."""
    width, height = (max(1, round(largest ** rng.random())) for _ in range(2))
    mode = rng.choice(list(FORMATS))
    kind = rng.choice(FORMATS[mode])
    picture = _picture(rng, width, height, mode)
    buffer = io.BytesIO()
    options = {"quality": rng.randint(30, 95)} if kind in {"JPEG", "WEBP"} else {}
    picture.save(buffer, format=kind, **options)
    return buffer.getvalue(), f"{width} x {height} {mode} {kind}"


def _picture(rng, width, height, mode):
    noise = np.random.default_rng(rng.randrange(2**32))
    kind = rng.randrange(3)
    if kind == 0:
        values = noise.integers(0, 256, (height, width, 4), dtype=np.uint8)
    elif kind == 1:
        x, y = np.meshgrid(np.arange(width), np.arange(height))
        steps = noise.integers(1, 40, 4)
        values = np.stack([(x * s + y * (41 - s)) % 256 for s in steps], -1).astype(np.uint8)
    else:
        values = np.full((height, width, 4), 255, np.uint8)
        left, top = noise.integers(0, width), noise.integers(0, height)
        values[top : top + height // 2 + 1, left : left + width // 2 + 1] = noise.integers(
            0, 256, 4
        )
    if mode == "I;16":
        deep = values[..., 0].astype(np.uint16) * 257
        return PIL.Image.fromarray(deep)
    picture = PIL.Image.fromarray(values, mode="RGBA" if mode != "CMYK" else "CMYK")
    if mode in {"RGBA", "CMYK"}:
        return picture
    return picture.convert("RGB").convert(mode) if mode == "P" else picture.convert(mode)
