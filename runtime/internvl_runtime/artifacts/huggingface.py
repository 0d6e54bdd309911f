"""The Hugging Face hub, or a mirror that speaks its protocol.

The hub's package resolves repositories and knows their errors; the bytes come
through the same downloads as those of every other source, which check digests.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import httpx
import huggingface_hub
import huggingface_hub.errors as hub_errors

from internvl_runtime import errors
from internvl_runtime.artifacts import http_files, remote

_UNAUTHORIZED, _SERVER_ERROR, _TOO_MANY = 401, 500, 429


class HuggingFace:
    """One repository at one revision."""

    def __init__(
        self,
        repository: str,
        revision: str,
        *,
        endpoint: str | None,
        token: str | None,
        read_seconds: float,
    ) -> None:
        self._repository, self._revision = repository, revision
        self._api = huggingface_hub.HfApi(endpoint=endpoint, token=token or False)
        self._endpoint = endpoint
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._http = http_files.HttpFiles(headers, refuse=self._refuse, read_seconds=read_seconds)
        self._read_seconds = read_seconds

    def list_files(self) -> remote.Listing:
        """Return the wanted files at the commit that the revision stands for now."""
        with self._translating():
            info = self._api.model_info(
                self._repository,
                revision=self._revision,
                files_metadata=True,
                timeout=self._read_seconds,
            )
        commit = info.sha
        if not commit:
            raise remote.TransientError(f"{self._repository}: the hub names no commit")
        pinned = {"repository": self._repository, "revision": commit}
        if self._endpoint:
            pinned["endpoint"] = self._endpoint
        return remote.Listing(
            [
                self._describe(s, commit)
                for s in info.siblings or []
                if remote.is_wanted(s.rfilename)
            ],
            commit,
            {"huggingFace": pinned},
        )

    def _describe(self, sibling: Any, commit: str) -> remote.RemoteFile:
        digest = (
            remote.Digest("sha256", sibling.lfs.sha256)
            if sibling.lfs
            else remote.Digest("git", sibling.blob_id)
        )
        return remote.RemoteFile(
            path=sibling.rfilename,
            size=sibling.size,
            identifier=f"{digest.algorithm}:{digest.value}",
            digest=digest,
            location={
                "url": huggingface_hub.hf_hub_url(
                    self._repository, sibling.rfilename, revision=commit, endpoint=self._endpoint
                )
            },
        )

    def read(
        self, file: remote.RemoteFile, start: int
    ) -> contextlib.AbstractContextManager[remote.Stream]:
        """Open a file at a byte."""
        return self._http.read(file.location["url"], start)

    def close(self) -> None:
        """End its connections."""
        self._http.close()

    @contextlib.contextmanager
    def _translating(self) -> Iterator[None]:
        try:
            yield
        except hub_errors.GatedRepoError as e:
            raise self._gated(str(e)) from e
        except hub_errors.RevisionNotFoundError as e:
            raise errors.StageError(
                errors.Reason.REVISION_NOT_FOUND,
                f"{self._repository} has no revision {self._revision!r}",
                remedy="name a branch, tag or commit of the repository in revision",
            ) from e
        except hub_errors.RepositoryNotFoundError as e:
            raise self._absent() from e
        except hub_errors.HfHubHTTPError as e:
            raise self._from_status(e) from e
        except (httpx.TransportError, OSError) as e:
            raise remote.TransientError(f"{self._repository}: {e}") from e

    def _from_status(self, error: hub_errors.HfHubHTTPError) -> Exception:
        status = error.response.status_code
        words = f"{self._repository}: the hub answered {status}"
        if status >= _SERVER_ERROR or status == _TOO_MANY:
            after = error.response.headers.get("retry-after")
            return remote.TransientError(words, retry_after=http_files.seconds(after))
        return self._refuse(status, words)

    def _refuse(self, status: int, words: str) -> errors.StageError:
        match status:
            case 401:
                return errors.StageError(
                    errors.Reason.AUTHENTICATION_FAILED,
                    words,
                    remedy="give a valid token that may read the repository (tokenSecretRef, or "
                    "HF_TOKEN)",
                )
            case 403:
                return self._gated(words)
            case 404:
                return self._absent()
            case _:
                return errors.StageError(
                    errors.Reason.SOURCE_UNREACHABLE,
                    words,
                    remedy="check the endpoint; a mirror must speak the hub's protocol",
                )

    def _gated(self, words: str) -> errors.StageError:
        return errors.StageError(
            errors.Reason.MODEL_GATED,
            f"{self._repository} is gated: {words.splitlines()[0]}",
            remedy="accept the model's terms with the account that the token belongs to, and give "
            "that token (tokenSecretRef, or HF_TOKEN)",
        )

    def _absent(self) -> errors.StageError:
        return errors.StageError(
            errors.Reason.MODEL_NOT_FOUND,
            f"there is no repository {self._repository}, or it is private",
            remedy="correct the repository's name, or give a token that may read it",
        )
