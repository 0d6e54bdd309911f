"""Bytes to an RGB picture, bounded before anything is decoded."""

import io

import PIL.Image

from internvl_runtime import errors

PIL.Image.MAX_IMAGE_PIXELS = None
"""Our own limit is checked instead, and is a refusal and no warning."""
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")


def open_picture(data: bytes, *, max_pixels: int) -> PIL.Image.Image:
    """Open a picture without decoding it; its size is known and within the limit afterwards.

    Raises RequestError when the bytes are no picture or the picture is too large.
    """
    try:
        picture = PIL.Image.open(io.BytesIO(data), formats=_FORMATS)
    except PIL.UnidentifiedImageError as e:
        raise _unreadable("its format is not known") from e
    except Exception as e:
        # Decoders meet hostile bytes with errors of every kind; Pillow lists none.
        raise _unreadable(e) from e
    if picture.width * picture.height > max_pixels:
        raise errors.RequestError(
            f"the picture has {picture.width} x {picture.height} pixels; at most {max_pixels} "
            "pixels are accepted: send a smaller one",
            parameter="messages",
            code="image_too_large",
        )
    return picture


def decode_rgb(picture: PIL.Image.Image) -> PIL.Image.Image:
    """Decode to RGB as the reference does: no EXIF rotation, alpha dropped.

    Raises RequestError when the data are cut short or broken.
    """
    try:
        return picture.convert("RGB")
    except Exception as e:
        # As above: whatever a decoder raises, the picture is what is wrong.
        raise _unreadable(e) from e


def _unreadable(error: object) -> errors.RequestError:
    return errors.RequestError(
        f"the picture can not be read ({error}); send a complete {', '.join(_FORMATS)} file",
        parameter="messages",
        code="invalid_image",
    )
