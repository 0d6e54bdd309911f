"""Content addresses of checkpoints and engines, as the runtime computes them.

This is an implementation of its own; a contract test holds it equal to the
runtime's. A key is the SHA-256 of canonical JSON over {schema, kind, inputs}.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

SCHEMA = 1


def checkpoint_key(
    *,
    weights: str,
    dtype: str,
    quantization: str,
    tensor_parallel_size: int,
    converter_format: int,
) -> str:
    """Return the key of a converted checkpoint."""
    return _key(
        "checkpoints",
        {
            "weights": weights,
            "dtype": dtype,
            "quantization": quantization,
            "tensorParallelSize": tensor_parallel_size,
            "converterFormat": converter_format,
        },
    )


def engine_key(
    *,
    checkpoint: str,
    backend: str,
    architecture: str,
    versions: Mapping[str, str],
    engine_format: int,
    build: Mapping[str, int],
) -> str:
    """Return the key of an engine."""
    return _key(
        "engines",
        {
            "checkpoint": checkpoint,
            "backend": backend,
            "architecture": architecture,
            "versions": dict(versions),
            "engineFormat": engine_format,
            "build": dict(build),
        },
    )


def short_hash(value: Any) -> str:
    """Return 12 hexadecimal digits for any JSON value: enough for a name."""
    return hashlib.sha256(_canonical(value)).hexdigest()[:12]


def _key(kind: str, inputs: Mapping[str, Any]) -> str:
    content = {"schema": SCHEMA, "kind": kind, "inputs": inputs}
    return hashlib.sha256(_canonical(content)).hexdigest()


def _canonical(value: Any) -> bytes:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return text.encode()
