"""What of a cache can go: planned from manifests alone, then removed marker first."""

import dataclasses
import fcntl
import shutil
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence

from internvl_runtime.store import cache as caches
from internvl_runtime.store import keys

_PARENTS = {keys.Kind.ENGINES: "checkpoint", keys.Kind.CHECKPOINTS: "weights"}
"""The input of a kind that names what it was built from."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """A published folder, as pruning sees it."""

    kind: keys.Kind
    key: str
    parent: str | None
    """Key of what it was built from."""
    published_at: str
    """ISO 8601, UTC."""
    size: int
    """Bytes of its own files."""

    @classmethod
    def of(cls, published: caches.Published) -> "Entry":
        """Read a manifest."""
        manifest = published.manifest
        return cls(
            manifest.kind,
            published.path.name,
            manifest.inputs.get(_PARENTS.get(manifest.kind, "")),
            str(manifest.provenance.get("publishedAt", "")),
            sum(file["size"] for file in manifest.files),
        )


def list_entries(cache: caches.Cache) -> list[Entry]:
    """Return everything that is published."""
    return [Entry.of(found) for kind in keys.Kind for found in cache.list_published(kind)]


def list_damaged(cache: caches.Cache) -> list[tuple[Entry, str]]:
    """Return the folders that were complete and that nobody reads now, each with the reason."""
    return [
        (Entry(kind, path.name, None, "", caches.size_of(path)), why)
        for kind in keys.Kind
        for path, why in cache.list_damaged(kind)
    ]


def plan(
    entries: Sequence[Entry], *, keep_engines: int, in_use: Collection[str], free_bytes: int = 0
) -> list[Entry]:
    """Return what can go, in the order in which it goes.

    Of each model's weights the newest `keep_engines` engines stay, and whatever
    is in use, with all that they are built from. Checkpoints that no engine
    stands on go. Weights go only where `free_bytes` are still wanted behind
    that, the oldest first: they cost a download.
    """
    by_key = {entry.key: entry for entry in entries}
    kept = set(in_use) | _newest(entries, by_key, keep_engines)
    for key in list(kept):
        kept |= set(_ancestors(key, by_key))
    gone = [
        entry
        for kind in (keys.Kind.ENGINES, keys.Kind.CHECKPOINTS)
        for entry in _oldest_first(entries, kind)
        if entry.key not in kept
    ]
    missing = free_bytes - sum(entry.size for entry in gone)
    used = set(in_use)
    for key in in_use:
        used |= set(_ancestors(key, by_key))
    for entry in _oldest_first(entries, keys.Kind.WEIGHTS):
        if missing > 0 and entry.key not in used:
            gone.append(entry)
            missing -= entry.size
    return gone


def remove(cache: caches.Cache, entry: Entry) -> bool:
    """Remove a published folder unless a builder holds its key; return whether it is gone."""
    lock = cache.lock_path(entry.kind, entry.key)
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        path = cache.path_of(entry.kind, entry.key)
        # Without its marker nobody reads what is left, should this process end here.
        (path / caches.MARKER).unlink(missing_ok=True)
        shutil.rmtree(path, ignore_errors=True)
        return not path.exists()


def _newest(entries: Sequence[Entry], by_key: Mapping[str, Entry], keep_engines: int) -> set[str]:
    of_weights: defaultdict[str, list[Entry]] = defaultdict(list)
    for entry in reversed(_oldest_first(entries, keys.Kind.ENGINES)):
        *_, weights = [entry.key, *_ancestors(entry.key, by_key)]
        of_weights[weights].append(entry)
    return {entry.key for engines in of_weights.values() for entry in engines[:keep_engines]}


def _ancestors(key: str, by_key: Mapping[str, Entry]) -> Iterator[str]:
    entry = by_key.get(key)
    while entry and entry.parent:
        yield entry.parent
        entry = by_key.get(entry.parent)


def _oldest_first(entries: Sequence[Entry], kind: keys.Kind) -> list[Entry]:
    own = [entry for entry in entries if entry.kind is kind]
    return sorted(own, key=lambda entry: (entry.published_at, entry.key))
