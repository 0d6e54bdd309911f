"""A ModelScope repository, by the routes that its own client uses.

`GET /api/v1/models/<owner>/<name>/repo/files` lists files with SHA-256 and the
commit of each; `…/repo?Revision=&FilePath=` sends one
(https://github.com/modelscope/modelscope, `hub/api.py`).
"""

import contextlib
import urllib.parse
from typing import Any

from internvl_runtime import errors
from internvl_runtime.artifacts import http_files, remote

ENDPOINT = "https://www.modelscope.cn"
_OK = 200


class ModelScope:
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
        self._endpoint = endpoint
        root = (endpoint or ENDPOINT).rstrip("/")
        self._root = f"{root}/api/v1/models/{urllib.parse.quote(repository)}/repo"
        # Older routes know the token as a cookie, newer ones as a bearer's.
        headers = (
            {"Authorization": f"Bearer {token}", "Cookie": f"m_session_id={token}"} if token else {}
        )
        self._http = http_files.HttpFiles(headers, refuse=self._refuse, read_seconds=read_seconds)

    def list_files(self) -> remote.Listing:
        """Return the wanted files, each pinned to its own commit."""
        query = urllib.parse.urlencode({"Revision": self._revision, "Recursive": "true"})
        answer = self._http.get_json(f"{self._root}/files?{query}")
        if answer.get("Code") != _OK:
            raise self._refuse(answer.get("Code", 0), f"ModelScope: {answer.get('Message')}")
        entries = answer["Data"]["Files"]
        pinned = {"repository": self._repository, "revision": self._revision}
        if self._endpoint:
            pinned["endpoint"] = self._endpoint
        return remote.Listing(
            [self._describe(entry) for entry in entries if remote.is_wanted(entry["Path"])],
            self._revision,
            {"modelScope": pinned},
        )

    def _describe(self, entry: dict[str, Any]) -> remote.RemoteFile:
        commit = entry.get("Revision") or self._revision
        query = urllib.parse.urlencode({"Revision": commit, "FilePath": entry["Path"]})
        return remote.RemoteFile(
            path=entry["Path"],
            size=entry["Size"],
            identifier=f"sha256:{entry['Sha256']}",
            digest=remote.Digest("sha256", entry["Sha256"]),
            location={"url": f"{self._root}?{query}"},
        )

    def read(
        self, file: remote.RemoteFile, start: int
    ) -> contextlib.AbstractContextManager[remote.Stream]:
        """Open a file at a byte."""
        return self._http.read(file.location["url"], start)

    def close(self) -> None:
        """End its connections."""
        self._http.close()

    def _refuse(self, status: int, words: str) -> errors.StageError:
        match status:
            case 401 | 403:
                return errors.StageError(
                    errors.Reason.AUTHENTICATION_FAILED,
                    words,
                    remedy="give a token that may read the repository (tokenSecretRef, or "
                    "MODELSCOPE_API_TOKEN)",
                )
            case 404:
                return errors.StageError(
                    errors.Reason.MODEL_NOT_FOUND,
                    f"there is no {self._repository} at revision {self._revision!r} on ModelScope "
                    f"({words})",
                    remedy="correct repository and revision; ModelScope's main branch is master",
                )
            case _:
                return errors.StageError(
                    errors.Reason.SOURCE_UNREACHABLE, words, remedy="check the endpoint"
                )
