"""Tensors from file to file through a bounded piece of memory.

Files are read and written by position, never mapped: mapped pages would count
as this process's memory.
"""

import contextlib
import errno
import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent import futures
from pathlib import Path

import ml_dtypes
import numpy as np

from internvl_runtime import errors
from internvl_runtime.artifacts import layout, safetensors_file

_BLOCK_BYTES = 16 * 2**20
"""Of a tensor that are converted at a time."""
_DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    layout.FP8: np.dtype(ml_dtypes.float8_e4m3fn),
}
_FP8_MOST = 448.0
"""Largest value of E4M3."""
_FP8_LEAST_SCALE = 1.0 / (_FP8_MOST * 512.0)
"""Of TensorRT-LLM's own quantization (`tensorrt_llm/models/convert_utils.py`)."""
_FP8_CLAMP = 1200.0
"""Likewise: larger weights are cut off."""


class Reader(contextlib.ExitStack):
    """Reads a checkpoint's tensors into memory that the next reading uses again."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._stored: dict[str, tuple[int, safetensors_file.Stored]] = {}
        self._memories = [bytearray(), bytearray()]
        for path in sorted(folder.glob("*.safetensors")):
            descriptor = os.open(path, os.O_RDONLY)
            self.callback(os.close, descriptor)
            for name, stored in safetensors_file.read_header(path).items():
                self._stored[name] = descriptor, stored

    def names_below(self, prefix: str) -> list[str]:
        """Return the names that begin with a prefix."""
        return [name for name in self._stored if name.startswith(prefix)]

    def load(self, names: Sequence[str]) -> list[layout.Array]:
        """Return tensors, good until the call after the next one.

        Raises StageError for a file that is cut short.
        """
        places = [self._stored[name] for name in names]
        memory = self._reserve(sum(stored.tensor.bytes for _, stored in places))
        loaded, start = [], 0
        for descriptor, stored in places:
            view = memoryview(memory)[start : start + stored.tensor.bytes]
            _read(descriptor, view, stored)
            array = np.frombuffer(view, dtype=_DTYPES[stored.tensor.dtype])
            loaded.append(array.reshape(stored.tensor.shape))
            start += stored.tensor.bytes
        return loaded

    def load_ahead(
        self, every: Iterable[Sequence[str]], thread: futures.Executor
    ) -> Iterator[list[layout.Array]]:
        """Yield tensors as `load` does, the next ones being read by a thread meanwhile."""
        coming: futures.Future[list[layout.Array]] | None = None
        for names in every:
            following = thread.submit(self.load, names)
            if coming:
                yield coming.result()
            coming = following
        if coming:
            yield coming.result()

    def _reserve(self, size: int) -> bytearray:
        self._memories.reverse()
        if len(self._memories[0]) < size:
            self._memories[0] = bytearray()
            self._memories[0] = bytearray(size)
        return self._memories[0]


class Writer(contextlib.ExitStack):
    """Writes the files of a layout; what an earlier process has written to them stays."""

    def __init__(self, folder: Path, files: layout.Layout, encoding: layout.Encoding) -> None:
        super().__init__()
        infos = files.infos(encoding)
        self._encoding = encoding
        self._placed = safetensors_file.place(infos)
        self._descriptors = {name: self._open(folder / name, infos) for name in files.files}
        head = safetensors_file.header(infos)
        self._hashes = {name: hashlib.sha256(head) for name in files.files}

    def _open(self, path: Path, infos: Sequence[safetensors_file.TensorInfo]) -> int:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        self.callback(os.close, descriptor)
        _allocate(descriptor, safetensors_file.size_of(infos))
        _write(descriptor, safetensors_file.header(infos), 0)
        return descriptor

    def write(self, name: str, parts: Iterable[layout.Array]) -> None:
        """Write each file's part of a tensor; raises StageError for a value beyond the dtype."""
        stored = self._placed[name]
        for descriptor, part in zip(self._descriptors.values(), parts, strict=True):
            if part.shape != stored.tensor.shape:
                raise ValueError(f"{name}: {part.shape}, planned {stored.tensor.shape}")
            if stored.tensor.dtype == layout.FP8:
                self._write_quantized(descriptor, part, stored)
            else:
                self._write_blocks(descriptor, part, stored)

    def _write_blocks(
        self, descriptor: int, part: layout.Array, stored: safetensors_file.Stored
    ) -> None:
        offset = stored.offset
        for block in _blocks(part):
            content = _bytes_of(block, stored.tensor)
            _write(descriptor, content, offset)
            offset += len(content)

    def _write_quantized(
        self, descriptor: int, part: layout.Array, stored: safetensors_file.Stored
    ) -> None:
        scales = self._placed[layout.scale_name(stored.tensor.name)]
        places = [stored.offset, scales.offset]
        for block in _blocks(part):
            for number, array in enumerate(quantize(block)):
                content = array.reshape(-1).view(np.uint8).data
                _write(descriptor, content, places[number])
                places[number] += len(content)

    def sync(self) -> None:
        """Make everything that was written durable."""
        for descriptor in self._descriptors.values():
            os.fdatasync(descriptor)

    def hash(self, group: layout.Group) -> None:
        """Take the group that is next in every file into the file's SHA-256."""
        infos = [info for tensor in group.tensors for info in tensor.infos(self._encoding)]
        first, last = self._placed[infos[0].name], self._placed[infos[-1].name]
        end = last.offset + last.tensor.bytes
        for name, descriptor in self._descriptors.items():
            for start in range(first.offset, end, _BLOCK_BYTES):
                # Just written, it is still in memory.
                block = os.pread(descriptor, min(_BLOCK_BYTES, end - start), start)
                self._hashes[name].update(block)

    @property
    def digests(self) -> dict[str, str]:
        """Return the SHA-256 of every file, once all groups are hashed."""
        return {name: found.hexdigest() for name, found in self._hashes.items()}


def quantize(rows: layout.Array) -> tuple[layout.Array, layout.Array]:
    """Return E4M3 values and float32 scales [rows]: a value is its number times its row's scale.

    The rule is that of TensorRT-LLM's FP8_PER_CHANNEL_PER_TOKEN.
    """
    wide = np.clip(rows.astype(np.float32), -_FP8_CLAMP, _FP8_CLAMP)
    scales = np.maximum(np.abs(wide).max(axis=1) / _FP8_MOST, np.float32(_FP8_LEAST_SCALE))
    scaled = np.clip(wide / scales[:, None], -_FP8_MOST, _FP8_MOST)
    return scaled.astype(_DTYPES[layout.FP8]), scales.astype(np.float32)


def _blocks(part: layout.Array) -> Iterator[layout.Array]:
    """Cut into rows that are converted at a time."""
    rows = max(1, _BLOCK_BYTES * len(part) // part.nbytes)
    for start in range(0, len(part), rows):
        yield part[start : start + rows]


def _bytes_of(block: layout.Array, tensor: safetensors_file.TensorInfo) -> memoryview:
    with np.errstate(over="ignore"):
        converted = np.ascontiguousarray(block, dtype=_DTYPES[tensor.dtype])
    if converted.dtype != block.dtype and not np.isfinite(converted).all():
        raise errors.StageError(
            errors.Reason.UNSUPPORTED_MODEL,
            f"{tensor.name} has values that {converted.dtype} can not hold",
            remedy="set spec.engine.dtype to bfloat16 or float32",
        )
    return converted.reshape(-1).view(np.uint8).data


def _allocate(descriptor: int, size: int) -> None:
    """Take the room for a file at once, where the file system can."""
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as e:
        if e.errno not in {errno.EOPNOTSUPP, errno.EINVAL}:
            raise
        os.ftruncate(descriptor, size)


def _read(descriptor: int, view: memoryview, stored: safetensors_file.Stored) -> None:
    offset = stored.offset
    while view:
        count = os.preadv(descriptor, [view], offset)
        if not count:
            raise errors.StageError(
                errors.Reason.DIGEST_MISMATCH,
                f"the file of {stored.tensor.name} ends within it",
                remedy="copy the file again; it is cut short",
            )
        view, offset = view[count:], offset + count


def _write(descriptor: int, content: bytes | memoryview, offset: int) -> None:
    view = memoryview(content)
    while view:
        count = os.pwrite(descriptor, view, offset)
        view, offset = view[count:], offset + count
