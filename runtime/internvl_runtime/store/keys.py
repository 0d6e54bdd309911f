"""Content addresses of weights, checkpoints and engines.

The operator has an implementation of its own; a contract test holds the two
equal. A key is the SHA-256 of canonical JSON over {schema, kind, inputs}, so
that equal inputs have one place and any other input has another.
"""

import enum
import hashlib
import json
from collections.abc import Mapping
from typing import Any, NewType

Key = NewType("Key", str)
"""64 hexadecimal digits; the name of a folder in the cache."""

SCHEMA = 1
CONVERTER_FORMAT = 1
"""Raised when the converter's output changes for equal inputs."""
ENGINE_FORMAT = 1
"""Raised when an engine builder's output changes for equal inputs."""


class Kind(enum.StrEnum):
    """What a folder of the cache holds; also the name of its parent folder."""

    WEIGHTS = "weights"
    CHECKPOINTS = "checkpoints"
    ENGINES = "engines"


def canonical_json(value: Any) -> bytes:
    """Return JSON with sorted keys, no spaces, in UTF-8."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return text.encode()


def key_of(kind: Kind, inputs: Mapping[str, Any]) -> Key:
    """Return the key of these inputs."""
    content = {"schema": SCHEMA, "kind": kind.value, "inputs": inputs}
    return Key(hashlib.sha256(canonical_json(content)).hexdigest())


def weights_inputs(files: list[dict[str, Any]]) -> dict[str, Any]:
    """Describe weights: for each file its path, size and strongest identifier."""
    return {"files": sorted(files, key=lambda file: str(file["path"]))}


def checkpoint_inputs(
    *, weights: str, dtype: str, quantization: str, tensor_parallel_size: int
) -> dict[str, Any]:
    """Describe a converted checkpoint."""
    return {
        "weights": weights,
        "dtype": dtype,
        "quantization": quantization,
        "tensorParallelSize": tensor_parallel_size,
        "converterFormat": CONVERTER_FORMAT,
    }


def engine_inputs(
    *,
    checkpoint: str,
    backend: str,
    architecture: str,
    versions: Mapping[str, str],
    build: Mapping[str, Any],
) -> dict[str, Any]:
    """Describe an engine: `build` holds every build flag after defaulting."""
    return {
        "checkpoint": checkpoint,
        "backend": backend,
        "architecture": architecture,
        "versions": dict(versions),
        "engineFormat": ENGINE_FORMAT,
        "build": dict(build),
    }
