"""`internvl-runtime cache`: what a cache holds, whether it is whole, and what can go."""

import argparse
from collections.abc import Sequence

import rich.console
import rich.progress
import rich.table

from internvl_runtime import errors
from internvl_runtime.store import cache as caches
from internvl_runtime.store import keys, prune

_SHORT = 12
_UNITS = ("B", "KiB", "MiB", "GiB")
_KIB = 1024


def run(arguments: argparse.Namespace, cache: caches.Cache) -> None:
    """Run `list`, `verify` or `prune`; raises StageError for a damaged file."""
    if not cache.root.is_dir():
        raise errors.StageError(
            errors.Reason.INVALID_SPEC,
            f"there is no cache folder {cache.root}",
            remedy="give the folder with --cache, or set INTERNVL_RUNTIME_CACHE_ROOT",
        )
    console = rich.console.Console()
    match arguments.action:
        case "list":
            _list(cache, console)
        case "verify":
            _verify(cache, console)
        case "prune":
            _prune(arguments, cache, console)


def _list(cache: caches.Cache, console: rich.console.Console) -> None:
    entries = prune.list_entries(cache)
    table = _table("kind", "key", "size", "published", "what")
    for entry in entries:
        manifest = cache.get(entry.kind, entry.key).manifest
        table.add_row(
            entry.kind.value, entry.key[:_SHORT], _bytes(entry.size), entry.published_at,
            _describe(manifest),
        )  # fmt: skip
    damaged = prune.list_damaged(cache)
    for entry, why in damaged:
        table.add_row(
            entry.kind.value, entry.key[:_SHORT], _bytes(entry.size), "", f"damaged: {why}"
        )
    console.print(table)
    size = sum(entry.size for entry in [*entries, *(entry for entry, _ in damaged)])
    console.print(f"{len(entries) + len(damaged)} folders, {_bytes(size)}")


def _describe(manifest: caches.Manifest) -> str:
    inputs = manifest.inputs
    match manifest.kind:
        case keys.Kind.WEIGHTS:
            told = [f"{len(inputs['files'])} files", manifest.provenance.get("revision") or ""]
            told += [reference.location for reference in manifest.references]
            return " ".join(filter(None, told))
        case keys.Kind.CHECKPOINTS:
            return (
                f"{inputs['dtype']}, {inputs['tensorParallelSize']} ranks, of weights "
                f"{inputs['weights'][:_SHORT]}"
            )
        case keys.Kind.ENGINES:
            return (
                f"{inputs['backend']} {inputs['architecture']}, of checkpoint "
                f"{inputs['checkpoint'][:_SHORT]}"
            )


def _verify(cache: caches.Cache, console: rich.console.Console) -> None:
    entries = prune.list_entries(cache)
    found = [why for _, why in prune.list_damaged(cache)]
    with rich.progress.Progress(console=console) as bar:
        task = bar.add_task("reading", total=sum(entry.size for entry in entries))
        for entry in entries:
            published = cache.get(entry.kind, entry.key)
            for file in published.manifest.files:
                if caches.sha256_of(published.path / file["path"]) != file["sha256"]:
                    found.append(f"{published.path / file['path']} differs from its manifest")
                bar.advance(task, file["size"])
    if found:
        raise errors.StageError(
            errors.Reason.DIGEST_MISMATCH,
            "; ".join(found),
            remedy="remove those folders (`cache prune` removes those that lack something): what "
            "is missing is built again",
        )
    console.print(f"{len(entries)} folders are whole")


def _prune(
    arguments: argparse.Namespace, cache: caches.Cache, console: rich.console.Console
) -> None:
    entries = prune.list_entries(cache)
    gone = prune.plan(
        entries,
        keep_engines=arguments.keep_engines,
        in_use=_full_keys(arguments.in_use, entries),
        free_bytes=arguments.free_bytes,
    )
    damaged = [entry for entry, _ in prune.list_damaged(cache)]
    entries, gone = [*damaged, *entries], [*damaged, *gone]
    table = _table("kind", "key", "size", "published", "")
    for entry in gone:
        removed = arguments.dry_run or prune.remove(cache, entry)
        words = "would go" if arguments.dry_run else "removed" if removed else "kept: in work"
        table.add_row(
            entry.kind.value, entry.key[:_SHORT], _bytes(entry.size), entry.published_at, words
        )
    if gone:
        console.print(table)
    console.print(f"{len(gone)} of {len(entries)} folders, {_bytes(sum(e.size for e in gone))}")


def _full_keys(given: Sequence[str], entries: Sequence[prune.Entry]) -> set[str]:
    """Return whole keys for beginnings of keys."""
    found = set()
    for start in given:
        matching = [entry.key for entry in entries if entry.key.startswith(start)]
        if not matching:
            raise errors.StageError(
                errors.Reason.INVALID_SPEC,
                f"no key begins with {start}",
                remedy="give keys as `internvl-runtime cache list` shows them",
            )
        found |= set(matching)
    return found


def _table(*columns: str) -> rich.table.Table:
    table = rich.table.Table(box=None, header_style="bold")
    for column in columns:
        table.add_column(column, justify="right" if column == "size" else "left")
    return table


def _bytes(size: float) -> str:
    for unit in _UNITS[:-1]:
        if size < _KIB:
            return f"{size:.0f} {unit}"
        size /= _KIB
    return f"{size:.1f} {_UNITS[-1]}"
