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
        for name, (descriptor, stored) in zip(names, places, strict=True):
            view = memoryview(memory)[start : start + stored.tensor.bytes]
            _read(descriptor, view, stored.offset, name)
            # Each is read once: its pages are of more use to what is written.
            os.posix_fadvise(descriptor, stored.offset, len(view), os.POSIX_FADV_DONTNEED)
            array = np.frombuffer(view, dtype=_DTYPES[stored.tensor.dtype])
            loaded.append(array.reshape(stored.tensor.shape))
            start += stored.tensor.bytes
        return loaded

    @contextlib.contextmanager
    def load_ahead(self, every: Iterable[Sequence[str]]) -> Iterator[Iterator[list[layout.Array]]]:
        """Give an iterator of tensors as `load` returns, each read while the one before is used."""
        with futures.ThreadPoolExecutor(1) as thread:
            yield self._loaded(every, thread)

    def _loaded(
        self, every: Iterable[Sequence[str]], thread: futures.Executor
    ) -> Iterator[list[layout.Array]]:
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
    """Writes the files of a layout from begin to end, and hashes them on the way.

    What an earlier process has written to them stays.
    """

    def __init__(self, folder: Path, files: layout.Layout, encoding: layout.Encoding) -> None:
        super().__init__()
        infos = files.infos(encoding)
        self._encoding = encoding
        self._placed = safetensors_file.place(infos)
        hashing = self.enter_context(futures.ThreadPoolExecutor(1))
        self._outputs = {
            name: self.enter_context(_Output(folder / name, infos, hashing)) for name in files.files
        }

    def write(self, name: str, parts: Iterable[layout.Array]) -> None:
        """Write each file's part of a tensor; raises StageError for a value beyond the dtype."""
        stored = self._placed[name]
        for output, part in zip(self._outputs.values(), parts, strict=True):
            if (part.shape, output.position) != (stored.tensor.shape, stored.offset):
                raise ValueError(f"{name}: {part.shape} at {output.position}, planned {stored}")
            for block in _encoded(part, stored.tensor):
                output.write(block)

    def skip(self, group: layout.Group) -> None:
        """Go behind a group that an earlier process has written."""
        infos = [info for tensor in group.tensors for info in tensor.infos(self._encoding)]
        end = self._placed[infos[-1].name].offset + infos[-1].bytes
        for output in self._outputs.values():
            output.skip_to(end)

    def sync(self) -> None:
        """Make everything that was written durable."""
        for output in self._outputs.values():
            output.sync()

    @property
    def digests(self) -> dict[str, str]:
        """Return the SHA-256 of every file, once all groups are there."""
        return {name: output.digest for name, output in self._outputs.items()}


class _Output(contextlib.ExitStack):
    """A file that is written in order; a block is hashed while the kernel takes it."""

    def __init__(
        self, path: Path, infos: Sequence[safetensors_file.TensorInfo], hashing: futures.Executor
    ) -> None:
        super().__init__()
        self._path, self._hashing = path, hashing
        self._hash = hashlib.sha256()
        self.position = 0
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        self.callback(os.close, self._descriptor)
        _allocate(self._descriptor, safetensors_file.size_of(infos))
        self.write(safetensors_file.header(infos))

    def write(self, content: bytes | memoryview) -> None:
        hashed = self._hashing.submit(self._hash.update, content)
        view = memoryview(content)
        while view:
            count = os.pwrite(self._descriptor, view, self.position)
            view, self.position = view[count:], self.position + count
        hashed.result()

    def skip_to(self, end: int) -> None:
        """Hash what is there."""
        block = memoryview(bytearray(min(_BLOCK_BYTES, end - self.position)))
        while self.position < end:
            view = block[: end - self.position]
            _read(self._descriptor, view, self.position, self._path.name)
            self._hash.update(view)
            self.position += len(view)

    def sync(self) -> None:
        os.fdatasync(self._descriptor)

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()


def _encoded(part: layout.Array, tensor: safetensors_file.TensorInfo) -> Iterator[memoryview]:
    """Yield a part's bytes as they lie in the file, FP8's scales behind its values."""
    if tensor.dtype != layout.FP8:
        yield from (_bytes_of(block, tensor) for block in _blocks(part))
        return
    scales = []
    for block in _blocks(part):
        values, found = quantize(block)
        scales.append(found)
        yield values.reshape(-1).view(np.uint8).data
    yield np.concatenate(scales).view(np.uint8).data


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


def _read(descriptor: int, view: memoryview, offset: int, name: str) -> None:
    while view:
        count = os.preadv(descriptor, [view], offset)
        if not count:
            raise errors.StageError(
                errors.Reason.DIGEST_MISMATCH,
                f"the file of {name} ends within it",
                remedy="copy the file again; it is cut short",
            )
        view, offset = view[count:], offset + count
