"""Safetensors files as streams: one tensor in memory, bytes that depend on nothing else.

The safetensors package writes a file from memory as a whole, and maps a file
that it reads, so that its pages count as ours. The format is eight bytes of
header length, a JSON header, and the tensors end to end
(https://github.com/huggingface/safetensors#format).
"""

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1}
_ALIGNMENT_BYTES = 8
_MOST_HEADER_BYTES = 100_000_000
"""As in the safetensors package."""


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Name, safetensors dtype (`F32`, `F16`, `BF16`, `F8_E4M3`) and shape of one tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Size of its data."""
        return ITEM_BYTES[self.dtype] * math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor, and where its bytes begin in a file."""

    tensor: TensorInfo
    offset: int


def place(tensors: Sequence[TensorInfo]) -> dict[str, Stored]:
    """Return where tensors lie in a file that holds them in this order."""
    offset = len(header(tensors))
    placed = {}
    for tensor in tensors:
        placed[tensor.name] = Stored(tensor, offset)
        offset += tensor.bytes
    return placed


def read_header(path: Path) -> dict[str, Stored]:
    """Return what a file holds; raises ValueError where it is no safetensors file."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > _MOST_HEADER_BYTES:
            raise ValueError(f"{path.name}: a header of {length} bytes")
        entries = json.loads(file.read(length))
    entries.pop("__metadata__", None)
    return {
        name: Stored(
            TensorInfo(name, entry["dtype"], tuple(entry["shape"])),
            8 + length + entry["data_offsets"][0],
        )
        for name, entry in entries.items()
    }


def size_of(tensors: Sequence[TensorInfo]) -> int:
    """Return the size in bytes of a file with these tensors."""
    return len(header(tensors)) + sum(tensor.bytes for tensor in tensors)


def write(
    path: Path, tensors: Sequence[TensorInfo], produce: Callable[[TensorInfo], bytes]
) -> None:
    """Write a file, asking for each tensor's little-endian bytes in order."""
    with path.open("wb") as file:
        file.write(header(tensors))
        for tensor in tensors:
            data = produce(tensor)
            if len(data) != tensor.bytes:
                raise ValueError(f"{tensor.name}: {len(data)} bytes, expected {tensor.bytes}")
            file.write(data)


def header(tensors: Sequence[TensorInfo]) -> bytes:
    """Return what comes before the tensors: length and JSON, padded to 8 bytes."""
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
