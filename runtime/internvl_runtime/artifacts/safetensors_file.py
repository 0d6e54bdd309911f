"""Writes safetensors files as a stream: one tensor in memory, bytes that depend on nothing else.

The safetensors package wants a whole file in memory; its format is eight bytes
of header length, a JSON header, and the tensors end to end
(https://github.com/huggingface/safetensors#format).
"""

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
_ALIGNMENT_BYTES = 8


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Name, safetensors dtype (`F32`, `F16`, `BF16`) and shape of one tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Size of its data."""
        return ITEM_BYTES[self.dtype] * math.prod(self.shape)


def size_of(tensors: Sequence[TensorInfo]) -> int:
    """Return the size in bytes of a file with these tensors."""
    return len(_header(tensors)) + sum(tensor.bytes for tensor in tensors)


def write(
    path: Path, tensors: Sequence[TensorInfo], produce: Callable[[TensorInfo], bytes]
) -> None:
    """Write a file, asking for each tensor's little-endian bytes in order."""
    with path.open("wb") as file:
        file.write(_header(tensors))
        for tensor in tensors:
            data = produce(tensor)
            if len(data) != tensor.bytes:
                raise ValueError(f"{tensor.name}: {len(data)} bytes, expected {tensor.bytes}")
            file.write(data)


def _header(tensors: Sequence[TensorInfo]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "data_offsets": [offset, offset + tensor.bytes],
        }
        offset += tensor.bytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT_BYTES)
    return len(text).to_bytes(8, "little") + text
