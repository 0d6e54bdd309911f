"""What the places that weights are downloaded from have in common."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors.index.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "added_tokens.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
)
"""Of a published repository, beside its safetensors; no pickle and no code is ever read."""


def is_wanted(path: str) -> bool:
    """Whether a file of a repository is needed."""
    return path in SMALL_FILES or ("/" not in path and path.endswith(".safetensors"))


@dataclasses.dataclass(frozen=True)
class Digest:
    """What a source says that a file's content hashes to."""

    algorithm: str
    """`sha256`, `md5`, or `git`: an object id, SHA-1 over `blob <size>\\0` and the content."""
    value: str
    """Hexadecimal."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RemoteFile:
    """A file that is offered for download."""

    path: str
    size: int
    """In bytes."""
    identifier: str
    """The strongest that the source gives: another content has another one."""
    digest: Digest | None
    location: Mapping[str, str]
    """What `Remote.read` needs: a URL, an ETag."""


@dataclasses.dataclass(frozen=True)
class Listing:
    """What a source holds at one moment."""

    files: Sequence[RemoteFile]
    revision: str | None
    """The commit that a branch or tag stood for; None where the source has none."""
    pinned: Mapping[str, Any]
    """The source as JSON that names this very content, as far as the source can."""


@dataclasses.dataclass(frozen=True)
class Stream:
    """Bytes of a file from some place on."""

    start: int
    """Where they begin: 0 when the source would not begin where it was asked to."""
    chunks: Iterator[bytes]


class Remote(Protocol):
    """A place that files are downloaded from.

    Methods raise StageError where another try would fail alike, and
    TransientError where it may not.
    """

    def list_files(self) -> Listing:
        """Return the wanted files."""
        ...

    def read(self, file: RemoteFile, start: int) -> contextlib.AbstractContextManager[Stream]:
        """Open a file at byte `start`."""
        ...

    def close(self) -> None:
        """End its connections."""
        ...


class TransientError(Exception):
    """Raised when a source did not answer this time."""

    def __init__(
        self, message: str, *, retry_after: float | None = None, restart: bool = False
    ) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        """Seconds that the source asks to wait."""
        self.restart = restart
        """Whether what has been read of the file is worth nothing."""
