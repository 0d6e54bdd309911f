"""The cache folder: where things lie, how they are published, when they are complete.

A builder fills a folder below tmp/, and publishing makes it durable, moves it
to its key and writes the marker `COMPLETE` last. A reader trusts only a folder
whose marker, name and file sizes agree; so nothing half-written is ever read.
"""

import contextlib
import dataclasses
import datetime
import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from internvl_runtime import errors
from internvl_runtime.store import keys

MANIFEST = "manifest.json"
MARKER = "COMPLETE"


@dataclasses.dataclass(frozen=True)
class Reference:
    """Another place that a folder needs: a key of the cache, or a folder outside it."""

    kind: str
    location: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a published folder says about itself."""

    kind: keys.Kind
    inputs: Mapping[str, Any]
    references: Sequence[Reference]
    files: Sequence[Mapping[str, Any]]
    """For each file `path`, `size` in bytes and `sha256`."""
    provenance: Mapping[str, Any]
    """What is worth knowing but does not change the content: versions, dates, durations."""

    def to_json(self) -> dict[str, Any]:
        """Return the content of manifest.json."""
        return {
            "schema": keys.SCHEMA,
            "kind": self.kind.value,
            "inputs": self.inputs,
            "references": [dataclasses.asdict(reference) for reference in self.references],
            "files": list(self.files),
            "provenance": self.provenance,
        }


@dataclasses.dataclass(frozen=True)
class Published:
    """A complete folder of the cache."""

    path: Path
    manifest: Manifest


class Cache:
    """One cache folder, shared by builders and servers of one claim."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path_of(self, kind: keys.Kind, key: str) -> Path:
        """Return where a key lies once it is published."""
        return self.root / kind.value / key

    def lock_path(self, kind: keys.Kind, key: str) -> Path:
        """Return the file whose lock a builder of a key holds."""
        return self.root / "locks" / f"{kind.value}-{key}"

    def find(self, kind: keys.Kind, key: str) -> Published | None:
        """Return a published folder, or None when it is absent or incomplete."""
        path = self.path_of(kind, key)
        try:
            manifest = read_manifest(path)
        except errors.StageError:
            return None
        return Published(path, manifest)

    def get(self, kind: keys.Kind, key: str) -> Published:
        """Return a published folder; raises StageError when it is absent or incomplete."""
        return Published(self.path_of(kind, key), read_manifest(self.path_of(kind, key)))

    def list_published(self, kind: keys.Kind) -> list[Published]:
        """Return the complete folders of a kind, sorted by their keys."""
        found = (self.find(kind, name) for name in self._names(kind))
        return [published for published in found if published]

    def list_damaged(self, kind: keys.Kind) -> list[tuple[Path, str]]:
        """Return the folders of a kind that were complete and are not now, each with the reason."""
        damaged = []
        for name in self._names(kind):
            if not (self.path_of(kind, name) / MARKER).exists():
                # Its publishing was cut off: a later builder finishes it.
                continue
            try:
                self.get(kind, name)
            except errors.StageError as e:
                damaged.append((self.path_of(kind, name), e.message))
        return damaged

    def _names(self, kind: keys.Kind) -> list[str]:
        folder = self.root / kind.value
        return sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []

    @contextlib.contextmanager
    def workspace(self, kind: keys.Kind, key: str) -> Iterator[Path]:
        """Hold the key's lock and give its working folder, which survives a failure.

        A second builder of the same key waits here, and finds the key published
        when its turn comes.
        """
        file, path = self.lock_path(kind, key), self.root / "tmp" / f"{kind.value}-{key}"
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self._finish(path, kind, key)
            path.mkdir(parents=True, exist_ok=True)
            yield path
            shutil.rmtree(path, ignore_errors=True)

    def publish(
        self,
        workspace: Path,
        *,
        kind: keys.Kind,
        inputs: Mapping[str, Any],
        references: Sequence[Reference] = (),
        provenance: Mapping[str, Any] | None = None,
        scratch: Sequence[str] = (),
        digests: Mapping[str, str] | None = None,
    ) -> Published:
        """Make a workspace durable and move it to the key of its inputs, but for scratch files.

        Files whose SHA-256 is in `digests`, by path, are not read again.
        """
        manifest = Manifest(
            kind=kind,
            inputs=inputs,
            references=references,
            files=[
                describe_file(path, workspace, digests or {})
                for path in _files_below(workspace)
                if path.name not in {MANIFEST, MARKER, *scratch}
            ],
            provenance={"publishedAt": _now(), **(provenance or {})},
        )
        _make_durable(workspace)
        # From here on the manifest says that everything else is there.
        _write_durably(workspace / MANIFEST, keys.canonical_json(manifest.to_json()))
        return self._move(workspace, kind, keys.key_of(kind, inputs))

    def _move(self, workspace: Path, kind: keys.Kind, key: str) -> Published:
        """Give a workspace with a manifest its place and its marker."""
        manifest = _parse_manifest((workspace / MANIFEST).read_bytes())
        listed = {MANIFEST, *(file["path"] for file in manifest.files)}
        for path in _files_below(workspace):
            if path.relative_to(workspace).as_posix() not in listed:
                path.unlink()
        target = self.path_of(kind, key)
        _replace_folder(workspace, target)
        _mark(target)
        return Published(target, manifest)

    def _finish(self, workspace: Path, kind: keys.Kind, key: str) -> None:
        """End what a builder had begun to publish when it was killed."""
        target = self.path_of(kind, key)
        if _is_ready(workspace, key):
            self._move(workspace, kind, key)
        elif not (target / MARKER).exists() and _is_ready(target, key):
            _mark(target)


def read_manifest(path: Path) -> Manifest:
    """Read the manifest of a published folder, and check marker, name and file sizes.

    Raises StageError (EngineIncompatible for engines is the caller's word).
    """
    try:
        content = (path / MANIFEST).read_bytes()
        marker = (path / MARKER).read_text(encoding="ascii")
    except OSError as e:
        raise _incomplete(path, f"{e.strerror}: {e.filename}") from e
    if marker.strip() != hashlib.sha256(content).hexdigest():
        raise _incomplete(path, f"{MARKER} does not match {MANIFEST}")
    manifest = _parse_manifest(content)
    _check(path, manifest, key=path.name)
    return manifest


def _is_ready(folder: Path, key: str) -> bool:
    """Whether a folder has everything but its marker."""
    try:
        _check(folder, _parse_manifest((folder / MANIFEST).read_bytes()), key=key)
    except (OSError, ValueError, errors.StageError):
        return False
    return True


def _check(path: Path, manifest: Manifest, *, key: str) -> None:
    if key != keys.key_of(manifest.kind, manifest.inputs):
        raise _incomplete(path, "its name is not the key of its inputs")
    for file in manifest.files:
        _check_size(path, file)


def _parse_manifest(content: bytes) -> Manifest:
    raw = json.loads(content)
    return Manifest(
        kind=keys.Kind(raw["kind"]),
        inputs=raw["inputs"],
        references=[Reference(**reference) for reference in raw["references"]],
        files=raw["files"],
        provenance=raw["provenance"],
    )


def clear(folder: Path) -> None:
    """Remove what an earlier try has left in a workspace."""
    for leftover in folder.iterdir():
        leftover.unlink() if leftover.is_file() else shutil.rmtree(leftover)


def describe_file(path: Path, root: Path, digests: Mapping[str, str]) -> dict[str, Any]:
    """Return path, size and SHA-256 of one file."""
    name = path.relative_to(root).as_posix()
    return {
        "path": name,
        "size": path.stat().st_size,
        "sha256": digests.get(name) or sha256_of(path),
    }


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def size_of(folder: Path) -> int:
    """Return the bytes of all files below a folder."""
    return sum(path.stat().st_size for path in _files_below(folder))


@contextlib.contextmanager
def naming_a_full_disk(root: Path) -> Iterator[None]:
    """Turn "no space left" into the reason DiskFull with the numbers."""
    try:
        yield
    except OSError as e:
        if e.errno not in {errno.ENOSPC, errno.EDQUOT}:
            raise
        usage = shutil.disk_usage(root)
        raise errors.StageError(
            errors.Reason.DISK_FULL,
            f"{root} is full: {usage.free} of {usage.total} bytes are free",
            remedy="make spec.cache.size larger, or remove engines that nobody uses",
        ) from e


def _check_size(path: Path, file: Mapping[str, Any]) -> None:
    try:
        size = (path / file["path"]).stat().st_size
    except OSError as e:
        raise _incomplete(path, f"{file['path']} is missing") from e
    if size != file["size"]:
        raise _incomplete(
            path, f"{file['path']} has {size} bytes, its manifest says {file['size']}"
        )


def _incomplete(path: Path, why: str) -> errors.StageError:
    return errors.StageError(
        errors.Reason.DIGEST_MISMATCH,
        f"{path} is not a complete folder: {why}",
        remedy="remove the folder, then delete the resource's Jobs and make it again",
    )


def _files_below(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _replace_folder(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        shutil.rmtree(target)
    source.rename(target)
    fsync(target.parent)


def _make_durable(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        fsync(path)


def _mark(target: Path) -> None:
    """Say that a folder is complete."""
    digest = hashlib.sha256((target / MANIFEST).read_bytes()).hexdigest()
    _write_durably(target / MARKER, digest.encode())


def _write_durably(path: Path, content: bytes) -> None:
    """Write a file whole, or not at all."""
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)
    fsync(path.parent)


def fsync(path: Path) -> None:
    """Make a file, or the names in a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _now() -> str:
    return datetime.datetime.now(tz=datetime.UTC).isoformat(timespec="seconds")
