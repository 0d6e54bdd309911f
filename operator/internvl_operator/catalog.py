"""What is known before anything is downloaded: the published models, shapes, pinned versions.

Dimensions: the `config.json` files of the OpenGVLab/InternVL2_5-* repositories.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dimensions:
    """What tells one published size from another."""

    family: str
    hidden_size: int
    num_hidden_layers: int


_SIZES = {
    "1B": Dimensions(family="qwen2", hidden_size=896, num_hidden_layers=24),
    "2B": Dimensions(family="internlm2", hidden_size=2048, num_hidden_layers=24),
    "4B": Dimensions(family="qwen2", hidden_size=2048, num_hidden_layers=36),
    "8B": Dimensions(family="internlm2", hidden_size=4096, num_hidden_layers=32),
    "26B": Dimensions(family="internlm2", hidden_size=6144, num_hidden_layers=48),
    "38B": Dimensions(family="qwen2", hidden_size=5120, num_hidden_layers=64),
    "78B": Dimensions(family="qwen2", hidden_size=8192, num_hidden_layers=80),
}

MODELS = {
    f"InternVL2_5-{size}{variant}": dimensions
    for variant in ("", "-MPO")
    for size, dimensions in _SIZES.items()
}
"""The 14 published models; the -MPO variants differ in weights alone."""

BUNDLED_MODELS = ("tiny-shapes", "tiny-shapes-internlm2")
"""Models that ship in the runtime image."""

SYNTHETIC_SHAPES = ("tiny", "tiny-6b-vision")
"""Shapes whose tokenizers the runtime can make up; the published ones need their vocabularies."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Release:
    """What of a runtime release goes into keys."""

    versions: Mapping[str, str]
    """Of the packages that an engine depends on."""
    converter_format: int
    engine_format: int

    def to_status(self) -> dict[str, Any]:
        """Return the release as status records it."""
        return {
            "versions": dict(self.versions),
            "converterFormat": self.converter_format,
            "engineFormat": self.engine_format,
        }

    @classmethod
    def from_status(cls, recorded: Mapping[str, Any]) -> "Release":
        """Read what `to_status` has returned."""
        return cls(
            versions=recorded["versions"],
            converter_format=recorded["converterFormat"],
            engine_format=recorded["engineFormat"],
        )


RELEASES = {
    "PyTorch": Release(versions={"torch": "2.11.0"}, converter_format=1, engine_format=1),
}
"""Releases in the default images, by backend; contract tests compare them with the runtime."""
