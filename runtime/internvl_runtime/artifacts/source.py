"""Where weights come from: a mounted folder, this package, or made here from a seed."""

import contextlib
import dataclasses
import hashlib
import json
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import safetensors

from internvl_runtime import errors
from internvl_runtime.artifacts import progress, remote, safetensors_file, synthesize, tensors
from internvl_runtime.model import config
from internvl_runtime.store import cache as caches
from internvl_runtime.store import keys

BUNDLED = Path(__file__).parent / "bundled"
"""The models that ship with this package, a folder each."""


@dataclasses.dataclass(frozen=True)
class Identified:
    """What a source holds, before anything is copied."""

    files: list[dict[str, Any]]
    """For each file `path`, `size` in bytes and `identifier`."""
    model: config.ModelConfig
    listing: remote.Listing | None = None
    """What there is to download, from a source that files are downloaded from."""

    @property
    def revision(self) -> str | None:
        """Return the commit that a branch or tag stands for, where the source has commits."""
        return self.listing.revision if self.listing else None

    @property
    def pinned(self) -> Mapping[str, Any] | None:
        """Return the source as JSON that names this very content; None where it always does."""
        return self.listing.pinned if self.listing else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fetched:
    """What a fetch has put into its workspace, beside the files."""

    references: Sequence[caches.Reference] = ()
    """Where the files are, where nothing needed to be copied."""
    digests: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """SHA-256 of files, by path, that are known already."""
    scratch: Sequence[str] = ()
    """Names in the workspace that are no files of the weights."""


class Source(Protocol):
    """A place that weights come from."""

    def holds(self, weights: caches.Published) -> bool:
        """Whether published weights can be used where this source is mounted."""
        ...

    def identify(self, cache: caches.Cache, stage: progress.Progress) -> Identified:
        """Tell files and model; raises StageError when the source is unusable."""
        ...

    def fetch(self, identified: Identified, workspace: Path, stage: progress.Progress) -> Fetched:
        """Fill the workspace, which may hold a part, or refer to where the files are."""
        ...


@dataclasses.dataclass(frozen=True)
class SyntheticSource:
    """Seeded random weights."""

    recipe: synthesize.Recipe
    tokenizer_model: Path

    def holds(self, weights: caches.Published) -> bool:
        """Whether the weights are a copy, and no reference to a folder."""
        return not weights.manifest.references

    def identify(self, cache: caches.Cache, stage: progress.Progress) -> Identified:
        """Tell what `fetch` will write; sizes are known without making the weights."""
        del cache, stage
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            model = synthesize.write_small_files(
                self.recipe, folder, tokenizer_model=self.tokenizer_model
            )
            sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
        for shard in synthesize.plan_shards(model):
            sizes[shard.name] = safetensors_file.size_of(shard.tensors)
        recipe = self.recipe
        identifier = (
            f"synthetic:{synthesize.FORMAT}:{recipe.shape}:{recipe.family or ''}:{recipe.seed}"
        )
        files = [
            {"path": path, "size": size, "identifier": identifier}
            for path, size in sorted(sizes.items())
        ]
        return Identified(files, model)

    def fetch(self, identified: Identified, workspace: Path, stage: progress.Progress) -> Fetched:
        """Write the checkpoint."""
        del identified
        caches.clear(workspace)
        synthesize.write_checkpoint(
            self.recipe,
            workspace,
            tokenizer_model=self.tokenizer_model,
            report=stage.step("synthesize", unit="bytes"),
        )
        return Fetched()


@dataclasses.dataclass(frozen=True)
class FolderSource:
    """A folder that is mounted here and wherever its weights are used; it is not copied."""

    folder: Path

    def holds(self, weights: caches.Published) -> bool:
        """Whether the weights are a copy, or refer to this very folder."""
        return weights_folder(weights) in {weights.path, self.folder}

    def identify(self, cache: caches.Cache, stage: progress.Progress) -> Identified:
        """Check every safetensors header and hash every file, unless size and mtime are known."""
        with _naming_an_unreadable_file():
            return self._identify(cache, stage)

    def _identify(self, cache: caches.Cache, stage: progress.Progress) -> Identified:
        model = config.read_model_config(self.folder)
        paths = self._list_files()
        check_tensors(paths, model)
        known = _read_digests(self._digests_file(cache))
        sizes = {path: path.stat().st_size for path in paths}
        report = stage.step("hash", unit="bytes")
        total, done = sum(sizes.values()), 0
        digests = {}
        for path in paths:
            stamp = f"{sizes[path]}:{path.stat().st_mtime_ns}"
            entry = known.get(path.name)
            digest = entry[1] if entry and entry[0] == stamp else caches.sha256_of(path)
            digests[path.name] = (stamp, digest)
            done += sizes[path]
            report(done, total)
        with caches.naming_a_full_disk(cache.root):
            _write_digests(self._digests_file(cache), digests)
        files = [
            {
                "path": path.name,
                "size": sizes[path],
                "identifier": f"sha256:{digests[path.name][1]}",
            }
            for path in paths
        ]
        return Identified(files, model)

    def fetch(self, identified: Identified, workspace: Path, stage: progress.Progress) -> Fetched:
        """Refer to the folder."""
        del identified, workspace, stage
        return Fetched(references=[caches.Reference("folder", str(self.folder))])

    def _list_files(self) -> list[Path]:
        small = [self.folder / name for name in remote.SMALL_FILES]
        shards = sorted(self.folder.glob("*.safetensors"))
        if not shards:
            raise errors.StageError(
                errors.Reason.MODEL_NOT_FOUND,
                f"there is no *.safetensors file in {self.folder}",
                remedy="point the source at the folder that holds config.json and *.safetensors; "
                "pickle files (*.bin) are never read",
            )
        return sorted([path for path in small if path.is_file()] + shards)

    def _digests_file(self, cache: caches.Cache) -> Path:
        name = hashlib.sha256(str(self.folder).encode()).hexdigest()
        return cache.root / "tmp" / f"digests-{name}.json"


@dataclasses.dataclass(frozen=True)
class BundledSource:
    """A small trained model that ships with this package; it is not copied."""

    name: str

    def holds(self, weights: caches.Published) -> bool:
        """Whether the weights are a copy, or refer to a bundled model."""
        return weights_folder(weights) in {weights.path, BUNDLED / self.name}

    def identify(self, cache: caches.Cache, stage: progress.Progress) -> Identified:
        """Hash the files; raises StageError when there is no such model."""
        folder = BUNDLED / self.name
        if not (folder / "config.json").is_file():
            known = sorted(path.parent.name for path in BUNDLED.glob("*/config.json"))
            raise errors.StageError(
                errors.Reason.MODEL_NOT_FOUND,
                f"there is no bundled model {self.name!r} in this image",
                remedy=f"use one of {', '.join(known)}",
            )
        return FolderSource(folder).identify(cache, stage)

    def fetch(self, identified: Identified, workspace: Path, stage: progress.Progress) -> Fetched:
        """Refer to the model."""
        del identified, workspace, stage
        return Fetched(references=[caches.Reference("bundled", self.name)])


def weights_folder(weights: caches.Published) -> Path:
    """Return the folder that holds the files of published weights."""
    for reference in weights.manifest.references:
        if reference.kind == "folder":
            return Path(reference.location)
        if reference.kind == "bundled":
            return BUNDLED / reference.location
    return weights.path


def check_tensors(paths: list[Path], model: config.ModelConfig) -> None:
    """Check that the safetensors files hold exactly the tensors of the model.

    Raises StageError naming the file or tensor that is broken, missing or of
    another shape.
    """
    found: dict[str, tuple[int, ...]] = {}
    for path in paths:
        if path.suffix == ".safetensors":
            found |= _read_shapes(path)
    for name, shape in tensors.list_tensors(model):
        if found.get(name) != shape:
            raise errors.StageError(
                errors.Reason.UNSUPPORTED_MODEL,
                f"tensor {name} should have shape {shape}, found {found.get(name, 'none')}",
                remedy="copy every file of the checkpoint again; it does not fit its config.json",
            )


@contextlib.contextmanager
def _naming_an_unreadable_file() -> Iterator[None]:
    try:
        yield
    except PermissionError as e:
        raise errors.StageError(
            errors.Reason.MODEL_NOT_FOUND,
            f"{e.filename} can not be read: {e.strerror}",
            remedy="make the model's folder and files readable for everyone",
        ) from e


def _read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    try:
        with safetensors.safe_open(path, framework="np") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, safetensors.SafetensorError) as e:
        raise errors.StageError(
            errors.Reason.DIGEST_MISMATCH,
            f"{path.name} is not a readable safetensors file: {e}",
            remedy="copy the file again; it is cut short or damaged",
        ) from e


def _read_digests(path: Path) -> dict[str, list[str]]:
    try:
        digests: dict[str, list[str]] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return digests


def _write_digests(path: Path, digests: Mapping[str, tuple[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{uuid.uuid4().hex}.partial")
    partial.write_bytes(keys.canonical_json(digests))
    partial.rename(path)
