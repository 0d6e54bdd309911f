"""Where a picture's bytes come from: `data:` URLs, files of an allowed folder, http(s)."""

import base64
import binascii
import os
import stat
import urllib.parse
from pathlib import Path

from internvl_runtime import errors

WEB_SCHEMES = frozenset({"http", "https"})


def scheme_of(url: str) -> str:
    """Return the scheme of a URL, in lower case."""
    return url.partition(":")[0].lower()


def read_url(url: str, *, max_bytes: int, folder: Path | None) -> bytes:
    """Return the bytes behind a `data:` or `file:` URL.

    `folder` is where files may be read, links followed; None allows none.
    Raises RequestError for another scheme, broken base64, a file elsewhere or
    too many bytes.
    """
    match scheme_of(url):
        case "data":
            return _read_data(url, max_bytes=max_bytes)
        case "file":
            return _read_file(url, max_bytes=max_bytes, folder=folder)
        case other:
            raise refused(
                f"the scheme {other[:20]!r} is not supported; use https:, http:, file: or "
                "data:image/...;base64,..."
            )


def refused(message: str, *, code: str = "invalid_image") -> errors.RequestError:
    """Return the error for a picture or video that can not be had."""
    return errors.RequestError(f"url: {message}", parameter="messages", code=code)


def too_large(max_bytes: int) -> errors.RequestError:
    """Return the error for more bytes than are accepted."""
    return refused(f"there are more than {max_bytes} bytes; send a smaller file")


def _read_data(url: str, *, max_bytes: int) -> bytes:
    head, comma, payload = url.partition(",")
    if not comma or not head.endswith(";base64"):
        raise refused("a data URL looks like data:image/png;base64,iVBORw0...")
    if len(payload) * 3 // 4 > max_bytes + 2:
        raise too_large(max_bytes)
    try:
        return base64.b64decode(payload, validate=True)
    except (ValueError, binascii.Error) as e:
        raise refused(f"the data URL is not valid base64: {e}") from e


def _read_file(url: str, *, max_bytes: int, folder: Path | None) -> bytes:
    if folder is None:
        raise refused(
            "files are not read by this server; send data:image/...;base64,... or have "
            "INTERNVL_RUNTIME_MEDIA_FOLDER set"
        )
    try:
        path = _path_below(url, folder)
        # Path.open takes no opener.
        with open(path, "rb", opener=_open_without_waiting) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ValueError("only plain files are read")
            content = file.read(max_bytes + 1)
    except (OSError, ValueError) as e:
        raise refused("there is no readable file of that name below the allowed folder") from e
    if len(content) > max_bytes:
        raise too_large(max_bytes)
    return content


def _open_without_waiting(path: str, flags: int) -> int:
    """Open a file; a named pipe does not wait for a writer."""
    return os.open(path, flags | os.O_NONBLOCK)


def _path_below(url: str, folder: Path) -> Path:
    parts = urllib.parse.urlsplit(url)
    if parts.netloc not in {"", "localhost"}:
        raise ValueError("a file URL names no host")
    path = Path(urllib.parse.unquote(parts.path, errors="strict")).resolve(strict=True)
    if not path.is_relative_to(folder.resolve()):
        raise ValueError("the path leaves the folder")
    return path
