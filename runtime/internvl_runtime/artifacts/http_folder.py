"""A folder of any web server.

With a file `SHA256SUMS` (what `sha256sum *` prints) the files and their digests
are known. Without one the published names are asked for, and a file is known by
its ETag or its date.
"""

import contextlib
import json
import re
import urllib.parse
from collections.abc import Iterator, Mapping

from internvl_runtime import errors
from internvl_runtime.artifacts import http_files, remote

INDEX = "SHA256SUMS"
_LINE = re.compile(r"([0-9a-f]{64}) [ *](?:\./)?(.+)")
_SHARDS = "model.safetensors.index.json"


class HttpFolder:
    """The files below one URL."""

    def __init__(self, url: str, *, headers: Mapping[str, str], read_seconds: float) -> None:
        self._url = url.rstrip("/") + "/"
        self._http = http_files.HttpFiles(headers, refuse=self._refuse, read_seconds=read_seconds)

    def list_files(self) -> remote.Listing:
        """Return the wanted files."""
        sums = self._http.get_text(self._url + INDEX)
        names = self._published_names() if sums is None else _parse_sums(sums)
        files = [self._describe(name, digest) for name, digest in names.items()]
        found = [file for file in files if file is not None]
        return remote.Listing(found, None, {"http": {"url": self._url}})

    def _published_names(self) -> dict[str, str | None]:
        shards = self._http.get_text(self._url + _SHARDS)
        files = set(json.loads(shards)["weight_map"].values()) if shards else {"model.safetensors"}
        return dict.fromkeys([*remote.SMALL_FILES, *sorted(files)])

    def _describe(self, name: str, sha256: str | None) -> remote.RemoteFile | None:
        url = self._url + urllib.parse.quote(name)
        described = self._http.describe(url)
        if described is None:
            if sha256 or name.endswith(".safetensors"):
                raise self._refuse(404, f"{url} answered 404")
            return None
        size, headers = described
        etag, modified = headers.get("etag"), headers.get("last-modified")
        if not (sha256 or etag or modified):
            raise errors.StageError(
                errors.Reason.INVALID_SPEC,
                f"{url} has neither an ETag nor a Last-Modified header",
                remedy=f"put a {INDEX} beside the files: sha256sum * > {INDEX}",
            )
        known = f"sha256:{sha256}" if sha256 else f"etag:{etag}" if etag else f"date:{modified}"
        return remote.RemoteFile(
            path=name,
            size=size,
            identifier=known,
            digest=remote.Digest("sha256", sha256) if sha256 else None,
            location={"url": url, **({"etag": etag} if etag else {})},
        )

    def read(
        self, file: remote.RemoteFile, start: int
    ) -> contextlib.AbstractContextManager[remote.Stream]:
        """Open a file at a byte."""
        return self._http.read(file.location["url"], start, etag=file.location.get("etag"))

    def close(self) -> None:
        """End its connections."""
        self._http.close()

    def _refuse(self, status: int, words: str) -> errors.StageError:
        match status:
            case 401 | 403:
                return errors.StageError(
                    errors.Reason.AUTHENTICATION_FAILED,
                    words,
                    remedy="give the headers that the server wants (headersSecretRef)",
                )
            case 404:
                return errors.StageError(
                    errors.Reason.MODEL_NOT_FOUND,
                    words,
                    remedy="point url at the folder that holds config.json and *.safetensors",
                )
            case _:
                return errors.StageError(
                    errors.Reason.SOURCE_UNREACHABLE, words, remedy="check the URL"
                )


def _parse_sums(text: str) -> dict[str, str | None]:
    return {name: digest for digest, name in _lines(text) if remote.is_wanted(name)}


def _lines(text: str) -> Iterator[tuple[str, str]]:
    for line in text.splitlines():
        if found := _LINE.fullmatch(line.strip()):
            yield found[1], found[2]
