"""Files over HTTP: ranges, redirects, and which answers are worth another try.

Proxies and private certificate authorities are taken from the standard
variables (HTTPS_PROXY, NO_PROXY, SSL_CERT_FILE, SSL_CERT_DIR).
"""

import contextlib
import datetime
import email.utils
import http
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import httpx

from internvl_runtime import errors
from internvl_runtime.artifacts import remote

_CONNECT_SECONDS = 15.0
_MOST_REDIRECTS = 8
_MOST_WORDS = 300
_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+)")
_CLIENT_ERROR, _SERVER_ERROR = 400, 500
_PASSING = {http.HTTPStatus.REQUEST_TIMEOUT, http.HTTPStatus.TOO_EARLY}
_PASSING |= {http.HTTPStatus.TOO_MANY_REQUESTS}

Refuse = Callable[[int, str], errors.StageError]
"""Makes the error for a 4xx status, with the URL and the server's words."""


class HttpFiles:
    """Reads URLs of one server; its headers go to no other one."""

    def __init__(self, headers: Mapping[str, str], *, refuse: Refuse, read_seconds: float) -> None:
        self._headers = headers
        self._refuse = refuse
        timeout = httpx.Timeout(read_seconds, connect=_CONNECT_SECONDS)
        self._client = httpx.Client(timeout=timeout)

    def close(self) -> None:
        """End its connections."""
        self._client.close()

    def get_json(self, url: str) -> Any:
        """Return a small JSON document."""
        with self._answer(url) as answer:
            self._refuse_unless_ok(answer, url)
            answer.read()
            try:
                return answer.json()
            except ValueError as e:
                raise remote.TransientError(f"{url} answered no JSON: {e}") from e

    def get_text(self, url: str) -> str | None:
        """Return a small text, None where there is none."""
        with self._answer(url) as answer:
            if answer.status_code == http.HTTPStatus.NOT_FOUND:
                return None
            self._refuse_unless_ok(answer, url)
            answer.read()
            return answer.text

    def describe(self, url: str) -> tuple[int, Mapping[str, str]] | None:
        """Return a file's size and headers, None where there is none.

        Asks for its first byte: not every server answers HEAD.
        """
        with self._answer(url, {"Range": "bytes=0-0"}) as answer:
            if answer.status_code == http.HTTPStatus.NOT_FOUND:
                return None
            if answer.status_code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                return 0, answer.headers
            self._refuse_unless_ok(answer, url)
            found = _RANGE.match(answer.headers.get("content-range", ""))
            size = found[2] if found else answer.headers.get("content-length", "0")
            return int(size), answer.headers

    @contextlib.contextmanager
    def read(
        self,
        url: str,
        start: int,
        *,
        etag: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Iterator[remote.Stream]:
        """Open a file at a byte, or at its beginning where it has another ETag by now."""
        more = dict(headers or {})
        if start:
            more["Range"] = f"bytes={start}-"
            if etag and not etag.startswith("W/"):
                more["If-Range"] = etag
        with self._answer(url, more) as answer:
            if start and answer.status_code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                raise remote.TransientError(f"{url} has no byte {start}", restart=True)
            self._refuse_unless_ok(answer, url)
            found = _RANGE.match(answer.headers.get("content-range", ""))
            yield remote.Stream(int(found[1]) if found else 0, answer.iter_raw())

    @contextlib.contextmanager
    def _answer(self, url: str, more: Mapping[str, str] | None = None) -> Iterator[httpx.Response]:
        """Follow redirects. Raises TransientError for what may go better next time."""
        first = asked = httpx.URL(url)
        for _ in range(_MOST_REDIRECTS):
            own = self._headers if _origin(asked) == _origin(first) else {}
            headers = {"Accept-Encoding": "identity", **own, **(more or {})}
            with _naming_transients(url), self._client.stream("GET", asked, headers=headers) as got:
                if not got.has_redirect_location:
                    _raise_passing(got, url)
                    yield got
                    return
                asked = asked.join(got.headers["location"])
        raise remote.TransientError(f"{url} redirects more than {_MOST_REDIRECTS} times")

    def _refuse_unless_ok(self, answer: httpx.Response, url: str) -> None:
        if answer.status_code >= _CLIENT_ERROR:
            raise self._refuse(answer.status_code, f"{url} answered {_describe(answer)}")


def _raise_passing(answer: httpx.Response, url: str) -> None:
    if answer.status_code >= _SERVER_ERROR or answer.status_code in _PASSING:
        after = seconds(answer.headers.get("retry-after"))
        raise remote.TransientError(f"{url} answered {_describe(answer)}", retry_after=after)


def _describe(answer: httpx.Response) -> str:
    answer.read()
    words = " ".join(answer.text.split())[:_MOST_WORDS]
    return f"{answer.status_code} {answer.reason_phrase}: {words}".rstrip(": ")


@contextlib.contextmanager
def _naming_transients(url: str) -> Iterator[None]:
    try:
        yield
    except httpx.TransportError as e:
        words = str(e) or type(e).__name__
        raise remote.TransientError(f"{url}: {words}") from e


def _origin(url: httpx.URL) -> tuple[str, str, int | None]:
    return url.scheme, url.host, url.port


def seconds(retry_after: str | None) -> float | None:
    """Read a Retry-After header: seconds, or a date."""
    if retry_after is None:
        return None
    if retry_after.isdecimal():
        return float(retry_after)
    try:
        until = email.utils.parsedate_to_datetime(retry_after)
    except ValueError:
        return None
    return max(0.0, (until - datetime.datetime.now(tz=until.tzinfo)).total_seconds())
