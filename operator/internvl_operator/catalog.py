"""What is known before anything is downloaded: the published models, shapes, pinned versions.

Dimensions: the `config.json` files of the OpenGVLab/InternVL2_5-* repositories.
"""

import dataclasses


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

TINY_SHAPES = ("tiny", "tiny-6b-vision")
SYNTHETIC_SHAPES = (*TINY_SHAPES, *(f"InternVL2_5-{size}" for size in _SIZES))

RUNTIME_VERSIONS = {"PyTorch": {"torch": "2.11.0"}}
"""Versions in the default images, by backend; a contract test compares them with the lock files."""
