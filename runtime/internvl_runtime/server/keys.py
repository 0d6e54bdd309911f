"""API keys: several, from a file that may change while the server runs."""

import hashlib
import hmac
import logging
from pathlib import Path

from internvl_runtime import errors
from internvl_runtime.server import asgi

logger = logging.getLogger(__name__)

_SCHEME = "bearer "


class ApiKeys:
    """The keys of a file, one a line; blank lines and lines from `#` on are skipped.

    The file is looked at for every request: a mounted Secret changes by a
    renamed link, and a new key counts at once. A file that can not be read
    leaves the last keys in force.
    """

    def __init__(self, path: Path) -> None:
        """Read the file; raises StageError when it can not be read or holds no key."""
        self._path = path
        self._stamp: tuple[int, int, int] | None = None
        self._digests: tuple[bytes, ...] = ()
        try:
            self._reload()
        except (OSError, ValueError) as e:
            raise errors.StageError(
                errors.Reason.INVALID_SPEC,
                f"the API keys can not be read: {e}",
                remedy="mount a Secret whose file holds one key a line",
            ) from e
        if not self._digests:
            raise errors.StageError(
                errors.Reason.INVALID_SPEC,
                f"{path} holds no API key",
                remedy="write one key a line, or leave INTERNVL_RUNTIME_API_KEYS_FILE out",
            )

    def accepts(self, authorization: str) -> bool:
        """Whether an Authorization header carries one of the keys."""
        try:
            self._reload()
        except (OSError, ValueError):
            logger.exception("the API keys can not be read; the last ones stay in force")
        if not authorization.lower().startswith(_SCHEME):
            return False
        given = _digest(authorization[len(_SCHEME) :].strip())
        matches = [hmac.compare_digest(given, known) for known in self._digests]
        return any(matches)

    def _reload(self) -> None:
        found = self._path.stat()
        stamp = (found.st_mtime_ns, found.st_ino, found.st_size)
        if stamp == self._stamp:
            return
        lines = self._path.read_text(encoding="utf-8").splitlines()
        keys = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        self._digests = tuple(map(_digest, keys))
        self._stamp = stamp
        logger.info("%d API keys are in force", len(keys))


class ApiKeyMiddleware:
    """ASGI middleware that answers 401 without a key, but for the health paths."""

    def __init__(self, app: asgi.App, *, keys: ApiKeys) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: asgi.Scope, receive: asgi.Receive, send: asgi.Send) -> None:
        """Pass a request with a key on."""
        is_open = scope["type"] != "http" or scope["path"] in asgi.HEALTH_PATHS
        if is_open or self._keys.accepts(asgi.header_of(scope, b"authorization")):
            await self._app(scope, receive, send)
            return
        response = asgi.refusal(
            401,
            "the API key is missing or wrong; send Authorization: Bearer <key>",
            kind="authentication_error",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )
        await response(scope, receive, send)


def _digest(key: str) -> bytes:
    """Equal lengths, whatever the keys' lengths: a comparison tells nothing by its time."""
    return hashlib.sha256(key.encode("utf-8", "replace")).digest()
