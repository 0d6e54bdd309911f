"""Checks a converted checkpoint against what its model wants, from the files' headers alone."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from internvl_runtime import errors
from internvl_runtime.artifacts import layout, safetensors_file
from internvl_runtime.model import config

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""The offered dtypes and their names in safetensors files."""


def encoding_of(*, dtype: str, quantization: str) -> layout.Encoding:
    """Return how a checkpoint stores its values."""
    return layout.Encoding(DTYPES[dtype], fp8=quantization == "FP8")


def check(folder: Path, model: config.ModelConfig, inputs: Mapping[str, Any]) -> None:
    """Raise StageError (DigestMismatch) naming the rank file or tensor that is not as it should be.

    `inputs` are those of the checkpoint's manifest.
    """
    encoding = encoding_of(dtype=inputs["dtype"], quantization=inputs["quantization"])
    layouts = layout.layouts(model, inputs["tensorParallelSize"])
    wanted = {name for files in layouts for name in files.files}
    found = {path.name for path in folder.glob("*.safetensors")}
    for name in sorted(wanted ^ found):
        word = "is missing" if name in wanted else "does not belong to it"
        raise _damaged(folder, f"{name} {word}: it is for {inputs['tensorParallelSize']} ranks")
    for files in layouts:
        infos = files.infos(encoding)
        for name in files.files:
            _check_file(folder / name, infos)


def _check_file(path: Path, infos: list[safetensors_file.TensorInfo]) -> None:
    try:
        stored = safetensors_file.read_header(path)
    except (OSError, ValueError) as e:
        raise _damaged(path.parent, f"{path.name} has no readable header ({e})") from e
    placed = safetensors_file.place(infos)
    for name in placed.keys() | stored.keys():
        ours, theirs = placed.get(name), stored.get(name)
        if ours is None or theirs is None:
            word = "lacks" if theirs is None else "should not have"
            raise _damaged(path.parent, f"{path.name} {word} the tensor {name}")
        if ours.tensor != theirs.tensor:
            raise _damaged(
                path.parent,
                f"{path.name}: {name} is {theirs.tensor.dtype} {list(theirs.tensor.shape)}, not "
                f"{ours.tensor.dtype} {list(ours.tensor.shape)}",
            )
    size = safetensors_file.size_of(infos)
    if path.stat().st_size != size:
        raise _damaged(path.parent, f"{path.name} has {path.stat().st_size} bytes, not {size}")


def _damaged(folder: Path, what: str) -> errors.StageError:
    return errors.StageError(
        errors.Reason.DIGEST_MISMATCH,
        f"the checkpoint {folder.name} is damaged: {what}",
        remedy="remove it from the cache and convert again",
    )
