"""Files from a remote place into a folder: in parallel, resumed at any byte, checked.

A file grows as `<name>.partial`; once its digest has been compared it is made
durable, renamed and noted in a journal, and never read again.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import logging
import os
import random
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from internvl_runtime import errors
from internvl_runtime.artifacts import journal, progress, remote
from internvl_runtime.store import cache

logger = logging.getLogger(__name__)

JOURNAL = "fetched-files"
"""In the folder, until it is published."""
_AT_ONCE = 8
"""Files; a published shard has up to 5 GB."""
_BLOCK_BYTES = 2**20
_MOST_WAIT_SECONDS = 300.0

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Patience:
    """How long a source that does not answer is asked again."""

    failures: int = 8
    """In a row, without a byte between them, after which it counts as unreachable."""
    first_delay: float = 1.0
    """Seconds; doubled with each failure in a row, and shortened by chance."""

    def delay(self, failures: int, retry_after: float | None) -> float:
        """Return the seconds to wait behind the n-th failure in a row."""
        if retry_after is not None:
            return min(retry_after, _MOST_WAIT_SECONDS)
        longest: float = min(self.first_delay * 2 ** (failures - 1), _MOST_WAIT_SECONDS)
        return longest * random.uniform(0.5, 1.0)  # noqa: S311 - spreads builders that wait


def insist(ask: Callable[[], T], patience: Patience) -> T:
    """Return what `ask` returns, however often it fails for the moment.

    Raises StageError (SourceUnreachable) when patience is at its end.
    """
    failures = 0
    while True:
        try:
            return ask()
        except remote.TransientError as e:
            failures += 1
            _wait(e, failures, patience)


def download(
    source: remote.Remote,
    files: Sequence[remote.RemoteFile],
    folder: Path,
    *,
    patience: Patience,
    report: progress.Report,
) -> dict[str, str]:
    """Fetch what is not there yet; return the SHA-256 of each file.

    Raises StageError: DiskFull before the first byte, SourceUnreachable,
    DigestMismatch when a file is another one twice, or what the source says.
    """
    fetched = journal.Journal(folder / JOURNAL)
    noted = dict(line.rsplit(" ", 1) for line in fetched.done)
    done = {file.path: noted[file.path] for file in files if _is_whole(folder, file, noted)}
    left = [file for file in files if file.path not in done]
    _check_room(folder, left)
    counter = _Counter(report, files, sum(_present(folder, file) for file in files))
    stopping = threading.Event()
    with concurrent.futures.ThreadPoolExecutor(_AT_ONCE, "fetch") as threads:
        fetching = {
            threads.submit(_Fetch(source, file, folder, patience, counter, stopping).run): file
            for file in left
        }
        try:
            for finished in concurrent.futures.as_completed(fetching):
                path = fetching[finished].path
                done[path] = finished.result()
                cache.fsync(folder)
                fetched.add(f"{path} {done[path]}")
        except BaseException:
            stopping.set()
            threads.shutdown(cancel_futures=True)
            raise
    counter.finish()
    return done


class _Fetch:
    """Fetches one file."""

    def __init__(
        self,
        source: remote.Remote,
        file: remote.RemoteFile,
        folder: Path,
        patience: Patience,
        counter: "_Counter",
        stopping: threading.Event,
    ) -> None:
        self._source, self._file = source, file
        self._target = folder / file.path
        self._partial = partial_path(folder, file)
        self._patience, self._counter, self._stopping = patience, counter, stopping

    def run(self) -> str:
        """Return the file's SHA-256 once it is there."""
        for is_last in (False, True):
            with self._partial.open("ab+") as output:
                hashes = _Hashes(self._file)
                hashes.take_in(output)
                self._fill(output, hashes)
                if not hashes.contradict(self._file):
                    os.fsync(output.fileno())
                    self._partial.rename(self._target)
                    return hashes.sha256
                self._restart(output, hashes)
            if not is_last:
                logger.warning("%s has another digest than its source says", self._file.path)
        raise errors.StageError(
            errors.Reason.DIGEST_MISMATCH,
            f"{self._file.path} has, twice fetched, not the digest that its source says "
            f"({self._file.identifier})",
            remedy="look for a proxy or mirror that changes files, or have the file uploaded again",
        )

    def _fill(self, output: Any, hashes: "_Hashes") -> None:
        """Append until the file has its size."""
        failures = 0
        while hashes.size != self._file.size:
            before = hashes.size
            try:
                if before > self._file.size:
                    raise remote.TransientError(f"{self._file.path} is too long", restart=True)
                self._append(output, hashes)
                if hashes.size < self._file.size:
                    raise remote.TransientError(
                        f"{self._file.path} ended at byte {hashes.size} of {self._file.size}"
                    )
            except remote.TransientError as e:
                failures = failures + 1 if hashes.size <= before else 1
                if e.restart:
                    self._restart(output, hashes)
                _wait(e, failures, self._patience, self._stopping.wait)

    def _append(self, output: Any, hashes: "_Hashes") -> None:
        with self._source.read(self._file, hashes.size) as stream:
            if stream.start != hashes.size:
                self._restart(output, hashes)
            if stream.start != hashes.size:
                raise remote.TransientError(
                    f"{self._file.path} was sent from byte {stream.start} on"
                )
            for chunk in stream.chunks:
                output.write(chunk)
                # What has come must outlive this process.
                output.flush()
                hashes.update(chunk)
                self._counter.add(len(chunk))
                if self._stopping.is_set():
                    raise concurrent.futures.CancelledError

    def _restart(self, output: Any, hashes: "_Hashes") -> None:
        self._counter.add(-hashes.size)
        output.truncate(0)
        hashes.clear()


class _Hashes:
    """SHA-256 of a file so far, and the digest that its source knows it by."""

    def __init__(self, file: remote.RemoteFile) -> None:
        self._file = file
        self.clear()

    def clear(self) -> None:
        """Begin again."""
        self.size = 0
        self._sha256 = hashlib.sha256()
        self._other: Any = None
        match self._file.digest:
            case remote.Digest("git", _):
                self._other = hashlib.sha1(usedforsecurity=False)
                self._other.update(f"blob {self._file.size}\0".encode())
            case remote.Digest("md5", _):
                self._other = hashlib.md5(usedforsecurity=False)

    def update(self, chunk: bytes) -> None:
        """Take in what comes next."""
        self.size += len(chunk)
        self._sha256.update(chunk)
        if self._other:
            self._other.update(chunk)

    def take_in(self, file: Any) -> None:
        """Take in what an earlier try has left."""
        file.seek(0)
        while chunk := file.read(_BLOCK_BYTES):
            self.update(chunk)

    @property
    def sha256(self) -> str:
        """Return the SHA-256 in hexadecimal."""
        return self._sha256.hexdigest()

    def contradict(self, file: remote.RemoteFile) -> bool:
        """Whether the source says otherwise."""
        if file.digest is None:
            return False
        found = self._other.hexdigest() if self._other else self.sha256
        return bool(found != file.digest.value)


class _Counter:
    """Adds up what all threads have got."""

    def __init__(
        self, report: progress.Report, files: Sequence[remote.RemoteFile], done: int
    ) -> None:
        self._report, self._lock = report, threading.Lock()
        self._total, self._done, self._told = sum(file.size for file in files), done, 0

    def add(self, count: int) -> None:
        """Count bytes; what is told never falls, also where a file begins again."""
        with self._lock:
            self._done += count
            self._told = max(self._told, min(self._done, self._total - 1))
            self._report(self._told, self._total)

    def finish(self) -> None:
        """Tell that everything is there."""
        self._report(self._total, self._total)


def partial_path(folder: Path, file: remote.RemoteFile) -> Path:
    """Return where a file lies while it is not whole."""
    return folder / f"{file.path}.partial"


def _is_whole(folder: Path, file: remote.RemoteFile, noted: Mapping[str, str]) -> bool:
    path = folder / file.path
    return file.path in noted and path.is_file() and path.stat().st_size == file.size


def _present(folder: Path, file: remote.RemoteFile) -> int:
    """Return how many bytes of a file are there."""
    for path in (folder / file.path, partial_path(folder, file)):
        with contextlib.suppress(FileNotFoundError):
            return min(path.stat().st_size, file.size)
    return 0


def _check_room(folder: Path, left: Sequence[remote.RemoteFile]) -> None:
    needed = sum(file.size - _present(folder, file) for file in left)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise errors.StageError(
            errors.Reason.DISK_FULL,
            f"the weights need {needed:,} more bytes, {free:,} are free in the cache: "
            f"{needed - free:,} are missing",
            remedy="make spec.cache.size larger, or remove weights and engines that nobody uses "
            "(internvl-runtime cache prune)",
        )


def _wait(
    error: remote.TransientError,
    failures: int,
    patience: Patience,
    sleep: Callable[[float], object] = time.sleep,
) -> None:
    if failures >= patience.failures:
        raise errors.StageError(
            errors.Reason.SOURCE_UNREACHABLE,
            f"{error} ({failures} times in a row)",
            remedy="check the endpoint, the proxy and the cluster's network policy; what has been "
            "fetched is kept for the next try",
        ) from error
    delay = patience.delay(failures, error.retry_after)
    logger.warning("%s; trying again in %.1f s", error, delay)
    sleep(delay)
