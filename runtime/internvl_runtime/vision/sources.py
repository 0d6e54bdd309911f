"""Where a picture's bytes come from: `data:` URLs."""

import base64

from internvl_runtime import errors


def read_url(url: str, *, max_bytes: int) -> bytes:
    """Return the bytes behind an `image_url`.

    Raises RequestError for another scheme, broken base64 or too many bytes.
    """
    scheme, _, rest = url.partition(":")
    if scheme.lower() != "data":
        raise _refused(
            f"the scheme {scheme[:20]!r} is not supported; send data:image/...;base64,..."
        )
    head, comma, payload = rest.partition(",")
    if not comma or not head.endswith(";base64"):
        raise _refused("a data URL looks like data:image/png;base64,iVBORw0...")
    if len(payload) * 3 // 4 > max_bytes + 2:
        raise _refused(f"the picture is larger than {max_bytes} bytes; send a smaller one")
    try:
        return base64.b64decode(payload, validate=True)
    except ValueError as e:
        raise _refused(f"the data URL is not valid base64: {e}") from e


def _refused(message: str) -> errors.RequestError:
    return errors.RequestError(f"image_url: {message}", parameter="messages", code="invalid_image")
