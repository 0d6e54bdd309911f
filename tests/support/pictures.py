"""Pictures that are drawn, so that tests need no files."""

import base64
import io

import av
import numpy as np
import PIL.Image


def draw(width, height):
    """Return an RGB picture full of edges."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    channels = [(7 * x + 3 * y) % 256, (5 * x + 11 * y + (x * y) // 97) % 256, (x ^ y) % 256]
    return PIL.Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


def film(count, *, width=64, height=48, codec="libx264", kind="mp4"):
    """Return a video whose frame n is grey n * 5."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=kind) as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in range(count):
            pixels = np.full((height, width, 3), number * 5, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def data_url(picture):
    """Return a picture as a data URL of a PNG."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def image_part(picture):
    """Return a picture as a content part."""
    return {"type": "image_url", "image_url": {"url": data_url(picture)}}
