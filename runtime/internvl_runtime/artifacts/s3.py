"""A prefix of a bucket, of AWS or of any server with S3's interface.

The library lists and signs; the bytes come through the downloads of every HTTP
source.
"""

import contextlib
import datetime
import http
import re
from collections.abc import Iterator
from typing import Any

import obstore
import obstore.exceptions
from obstore.store import S3Store

from internvl_runtime import errors
from internvl_runtime.artifacts import http_files, remote

_MD5_DIGITS = 32
_ENCRYPTION = "x-amz-server-side-encryption"
_SIGNED_FOR = datetime.timedelta(hours=12)
_STATUS = re.compile(r"status code: (\d{3})")
_SIGNATURE = re.compile(r"\?\S*")
"""The part of a signed URL that nobody else should see."""


class S3:
    """The objects below `s3://bucket/folder`; credentials come from the standard variables."""

    def __init__(
        self, uri: str, *, endpoint: str | None, region: str | None, read_seconds: float
    ) -> None:
        bucket, _, prefix = uri.removeprefix("s3://").partition("/")
        if not uri.startswith("s3://") or not bucket:
            raise errors.StageError(
                errors.Reason.INVALID_SPEC,
                f"the S3 source's uri is {uri!r}",
                remedy="write it as s3://bucket/folder",
            )
        given = {"uri": uri, "endpoint": endpoint, "region": region}
        self._given = {name: value for name, value in given.items() if value}
        options: dict[str, Any] = {"endpoint": endpoint} if endpoint else {}
        if region:
            options["region"] = region
        self._store = S3Store(
            bucket,
            prefix=prefix or None,
            client_options={
                "allow_http": bool(endpoint and endpoint.startswith("http://")),
                "timeout": f"{read_seconds}s",
            },
            # What is tried again, and how often, is one thing for all sources.
            retry_config={"max_retries": 0, "retry_timeout": datetime.timedelta(seconds=1)},
            **options,
        )
        self._http = http_files.HttpFiles({}, refuse=self._refuse, read_seconds=read_seconds)

    def list_files(self) -> remote.Listing:
        """Return the wanted objects."""
        with self._translating():
            found = [meta for batch in obstore.list(self._store) for meta in batch]
            files = [self._describe(meta) for meta in found if remote.is_wanted(meta["path"])]
        return remote.Listing(files, None, {"s3": self._given})

    def _describe(self, meta: Any) -> remote.RemoteFile:
        path, etag = meta["path"], meta["e_tag"]
        described = self._http.describe(self._sign(path))
        if not etag or described is None:
            raise remote.TransientError(f"{self._given['uri']}/{path} was there, and is not now")
        _, headers = described
        name = etag.strip('"')
        # The ETag of an object that came in one piece is its MD5, but for encrypted ones.
        is_md5 = len(name) == _MD5_DIGITS and headers.get(_ENCRYPTION, "AES256") == "AES256"
        return remote.RemoteFile(
            path=path,
            size=meta["size"],
            identifier=f"etag:{name}",
            digest=remote.Digest("md5", name) if is_md5 else None,
            location={"etag": etag},
        )

    def read(
        self, file: remote.RemoteFile, start: int
    ) -> contextlib.AbstractContextManager[remote.Stream]:
        """Open an object at a byte, as long as it is still the one that was listed."""
        own = {"If-Match": file.location["etag"]}
        return self._http.read(self._sign(file.path), start, headers=own)

    def close(self) -> None:
        """End its connections."""
        self._http.close()

    def _sign(self, path: str) -> str:
        return obstore.sign(self._store, "GET", path, _SIGNED_FOR)

    def _refuse(self, status: int, words: str) -> errors.StageError:
        words = _SIGNATURE.sub("", words)
        match status:
            case http.HTTPStatus.PRECONDITION_FAILED:
                return errors.StageError(
                    errors.Reason.DIGEST_MISMATCH,
                    f"{words}: the object has changed since it was listed",
                    remedy="wait until nobody writes to the bucket; the operator resolves it again",
                )
            case http.HTTPStatus.NOT_FOUND:
                return self._absent(words)
            case _:
                return self._unauthorized(words)

    def _absent(self, words: str) -> errors.StageError:
        return errors.StageError(
            errors.Reason.MODEL_NOT_FOUND,
            f"{self._given['uri']}: {words}",
            remedy="correct the uri: s3://bucket/folder of config.json and *.safetensors",
        )

    def _unauthorized(self, words: str) -> errors.StageError:
        return errors.StageError(
            errors.Reason.AUTHENTICATION_FAILED,
            f"{self._given['uri']}: {words}",
            remedy="give credentials that may list and read the bucket (credentialsSecretRef, or "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY)",
        )

    @contextlib.contextmanager
    def _translating(self) -> Iterator[None]:
        try:
            yield
        except (obstore.exceptions.BaseError, OSError) as e:
            raise self._from_library(str(e)) from e

    def _from_library(self, told: str) -> Exception:
        """Return what an error of the library means: its classes tell less than its words."""
        words = told.partition("\n")[0]
        found = _STATUS.search(told)
        status = int(found[1]) if found else 0
        if http.HTTPStatus.BAD_REQUEST <= status < http.HTTPStatus.INTERNAL_SERVER_ERROR:
            return self._refuse(status, words)
        return remote.TransientError(f"{self._given['uri']}: {words}")
