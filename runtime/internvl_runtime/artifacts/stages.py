"""The build stages that need no torch: resolve and fetch."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from internvl_runtime import errors
from internvl_runtime.artifacts import progress, source
from internvl_runtime.store import cache as caches
from internvl_runtime.store import keys

_LISTED_KEYS = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Resolved:
    """What the operator plans with."""

    weights: keys.Key
    family: str
    dimensions: dict[str, Any]
    size: int
    """Bytes of all files."""
    revision: str | None
    """The commit that a branch or tag stands for, where the source has commits."""
    source: Mapping[str, Any] | None
    """The source that names this very content: what to fetch from."""
    checkpoints: list[str]
    """Keys of checkpoints of these weights that are published, newest last."""
    engines: list[str]
    """Keys of engines of these weights that are published, newest last."""


def resolve(origin: source.Source, *, cache: caches.Cache, stage: progress.Progress) -> Resolved:
    """Identify a source: its weights key, its dimensions, and what is built on it already."""
    identified = origin.identify(cache, stage)
    weights = keys.key_of(keys.Kind.WEIGHTS, keys.weights_inputs(identified.files))
    checkpoints = _derived(cache, keys.Kind.CHECKPOINTS, "weights", {weights})
    engines = _derived(cache, keys.Kind.ENGINES, "checkpoint", set(checkpoints))
    return Resolved(
        weights=weights,
        family=identified.model.language.family.value,
        dimensions=dataclasses.asdict(identified.model.language),
        size=sum(file["size"] for file in identified.files),
        revision=identified.revision,
        source=identified.pinned,
        checkpoints=checkpoints[-_LISTED_KEYS:],
        engines=engines[-_LISTED_KEYS:],
    )


def fetch(
    origin: source.Source,
    *,
    weights: str,
    cache: caches.Cache,
    stage: progress.Progress,
) -> caches.Published:
    """Publish the weights of a source; raises StageError when they are other ones by now."""
    with cache.workspace(keys.Kind.WEIGHTS, weights) as workspace:
        published = cache.find(keys.Kind.WEIGHTS, weights)
        if published and origin.holds(published):
            return published
        identified = origin.identify(cache, stage)
        inputs = keys.weights_inputs(identified.files)
        _check_unchanged(weights, keys.key_of(keys.Kind.WEIGHTS, inputs))
        with caches.naming_a_full_disk(cache.root):
            fetched = origin.fetch(identified, workspace, stage)
            return cache.publish(
                workspace,
                kind=keys.Kind.WEIGHTS,
                inputs=inputs,
                references=fetched.references,
                digests=fetched.digests,
                scratch=fetched.scratch,
                provenance={"revision": identified.revision, "source": identified.pinned},
            )


def _check_unchanged(expected: str, found: str) -> None:
    if expected != found:
        raise errors.StageError(
            errors.Reason.DIGEST_MISMATCH,
            f"the source now has the weights key {found[:12]}, it was resolved as {expected[:12]}",
            remedy="wait until nobody writes to the source; the operator resolves it again",
        )


def _derived(cache: caches.Cache, kind: keys.Kind, field: str, parents: set[str]) -> list[str]:
    found = [
        (str(published.manifest.provenance.get("publishedAt")), published.path.name)
        for published in cache.list_published(kind)
        if published.manifest.inputs.get(field) in parents
    ]
    return [key for _, key in sorted(found)]
