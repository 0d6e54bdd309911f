"""Weights that are downloaded: from a hub, a bucket or a web server into the cache."""

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path

from internvl_runtime import errors
from internvl_runtime.artifacts import download, progress, remote, source
from internvl_runtime.model import config
from internvl_runtime.store import cache as caches

_NEEDED = ("config.json", "*.safetensors")


@dataclasses.dataclass(frozen=True)
class DownloadedSource:
    """A remote place, connected to when it is first needed."""

    connect: Callable[[], remote.Remote]
    patience: download.Patience

    def holds(self, weights: caches.Published) -> bool:
        """Whether the weights are a copy, and no reference to a folder."""
        return not weights.manifest.references

    def identify(self, cache: caches.Cache, stage: progress.Progress) -> source.Identified:
        """List the files, and read the model's dimensions out of config.json alone."""
        del cache, stage
        with contextlib.closing(self.connect()) as place, tempfile.TemporaryDirectory() as name:
            listing = self._list(place)
            small = [file for file in listing.files if file.path == "config.json"]
            download.download(
                place, small, Path(name), patience=self.patience, report=lambda *_: None
            )
            model = config.read_model_config(Path(name))
        files = [
            {"path": file.path, "size": file.size, "identifier": file.identifier}
            for file in listing.files
        ]
        return source.Identified(files, model, listing)

    def fetch(
        self, identified: source.Identified, workspace: Path, stage: progress.Progress
    ) -> source.Fetched:
        """Download what is not there yet, and check that it is the model that config.json tells."""
        files = identified.listing.files if identified.listing else ()
        with contextlib.closing(self.connect()) as place:
            digests = download.download(
                place,
                files,
                workspace,
                patience=self.patience,
                report=stage.step("download", unit="bytes"),
            )
        paths = [workspace / file.path for file in files]
        source.check_tensors(paths, config.read_model_config(workspace))
        return source.Fetched(digests=digests, scratch=(download.JOURNAL,))

    def _list(self, place: remote.Remote) -> remote.Listing:
        listing = download.insist(place.list_files, self.patience)
        for pattern in _NEEDED:
            if not any(Path(file.path).match(pattern) for file in listing.files):
                raise errors.StageError(
                    errors.Reason.MODEL_NOT_FOUND,
                    f"the source holds no {pattern}",
                    remedy="point the source at an InternVL2.5 repository with config.json and "
                    "*.safetensors; pickle files (*.bin) are never read",
                )
        return listing
