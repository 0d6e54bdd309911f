"""Pictures that are drawn, so that tests need no files."""

import base64
import io

import numpy as np
import PIL.Image


def draw(width, height):
    """Return an RGB picture full of edges."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    channels = [(7 * x + 3 * y) % 256, (5 * x + 11 * y + (x * y) // 97) % 256, (x ^ y) % 256]
    return PIL.Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


def data_url(picture):
    """Return a picture as a data URL of a PNG."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def image_part(picture):
    """Return a picture as a content part."""
    return {"type": "image_url", "image_url": {"url": data_url(picture)}}
