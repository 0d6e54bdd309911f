"""An engine folder: what a build publishes and `serve` reads, and nothing else."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from internvl_runtime import errors
from internvl_runtime.engine import device, interface
from internvl_runtime.engine.tensorrt import built as builts
from internvl_runtime.model import config, tokenizer
from internvl_runtime.store import cache as caches
from internvl_runtime.store import keys

MODEL_FOLDER = "model"
VERIFICATION = "verification.json"
_SHARED_MEMORY_BYTES = 512 * 2**20
"""Below, NCCL and MPI fail late and with other words; a container has 64 MiB unless it is told."""
KERNELS_FOLDER = "kernels"
"""Compiled modules of an engine for GPUs."""


def limits_of(flags: Mapping[str, int]) -> interface.EngineLimits:
    """Read build flags (camelCase, every one of them); raises StageError for other names."""
    names = {_camel_case(name): name for name in _flag_names()}
    if set(flags) != set(names):
        raise errors.StageError(
            errors.Reason.INVALID_SPEC,
            f"the build flags are {sorted(flags)}, expected {sorted(names)}",
            remedy="give each of them (docs/building.md); in a cluster, use the same release of "
            "operator and runtime image",
        )
    wrong = [f"{key} is {value!r}" for key, value in flags.items() if not _is_count(value)]
    if flags["maxInputTokens"] >= flags["maxSequenceTokens"]:
        wrong.append("maxInputTokens leaves no room for an answer in maxSequenceTokens")
    if wrong:
        raise errors.StageError(
            errors.Reason.INVALID_SPEC,
            f"the build flags can not be: {', '.join(wrong)}",
            remedy="give whole numbers from 1 on, and maxInputTokens below maxSequenceTokens",
        )
    values: dict[str, Any] = {names[key]: value for key, value in flags.items()}
    return interface.EngineLimits(**values)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def flags_of(limits: interface.EngineLimits) -> dict[str, int]:
    """Return limits under the names that keys and manifests use."""
    return {_camel_case(name): getattr(limits, name) for name in _flag_names()}


def _flag_names() -> list[str]:
    fields = dataclasses.fields(interface.EngineLimits)
    return [field.name for field in fields if field.name != "capabilities"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineFolder:
    """One engine, opened and checked."""

    key: str
    path: Path
    checkpoint: Path | None
    """What a PyTorch engine stands on; a TensorRT engine needs nothing else."""
    backend: str
    architecture: str
    dtype: str
    ranks: int
    """Processes that share the language model."""
    limits: interface.EngineLimits
    model: config.ModelConfig

    @property
    def speaks_mpi(self) -> bool:
        """Return whether its processes are those of an MPI job, TensorRT's single one, too."""
        return self.ranks > 1 or self.checkpoint is None

    @property
    def kernels(self) -> Path | None:
        """Return where the engine's compiled modules are, None where it has none."""
        folder = self.path / KERNELS_FOLDER
        return folder if folder.is_dir() else None

    def load_tokenizer(self) -> tokenizer.Tokenizer:
        """Load the engine's tokenizer."""
        return tokenizer.load_tokenizer(self.path / MODEL_FOLDER, self.model)

    def read_verification(self) -> list[dict[str, Any]]:
        """Return the recorded prompts and tokens."""
        recorded: list[dict[str, Any]] = json.loads(
            (self.path / VERIFICATION).read_text(encoding="utf-8")
        )
        return recorded


def open_engine(path: Path) -> EngineFolder:
    """Open a published engine and check that it fits this machine.

    Raises EngineIncompatibleError when architecture, versions or GPUs differ, and
    StageError when the folder or its checkpoint is not complete.
    """
    path = path.resolve()
    inputs = caches.read_manifest(path).inputs
    if "backend" not in inputs:
        raise errors.EngineIncompatibleError(
            f"{path} holds no engine",
            remedy="give a folder below engines/, as `internvl-runtime build` publishes it",
        )
    _check_device(inputs)
    opened = describe(path, inputs, caches.Cache(path.parent.parent))
    check_machine(architecture=opened.architecture, backend=opened.backend, ranks=opened.ranks)
    return opened


def describe(path: Path, inputs: Mapping[str, Any], cache: caches.Cache) -> EngineFolder:
    """Return what a folder is that holds an engine of these inputs, published or not."""
    if inputs["backend"] == "PyTorch":
        published = cache.get(keys.Kind.CHECKPOINTS, inputs["checkpoint"])
        checkpoint, made = published.path, published.manifest.inputs
        dtype, ranks = made["dtype"], made["tensorParallelSize"]
    else:
        built = builts.read(path / builts.LANGUAGE_FOLDER)
        checkpoint, dtype, ranks = None, built.dtype, built.ranks
    return EngineFolder(
        key=path.name,
        path=path,
        checkpoint=checkpoint,
        backend=inputs["backend"],
        architecture=inputs["architecture"],
        dtype=dtype,
        ranks=ranks,
        limits=dataclasses.replace(
            limits_of(inputs["build"]), capabilities=interface.OFFERED[inputs["backend"]]
        ),
        model=config.read_model_config(path / MODEL_FOLDER),
    )


def check_machine(*, architecture: str, backend: str, ranks: int) -> None:
    """Compare ranks, GPUs, driver and shared memory. Raises EngineIncompatibleError."""
    gpu = device.read_gpu()
    if gpu is None or device.torch_device(architecture) == "cpu":
        return
    if gpu.count < ranks:
        raise errors.EngineIncompatibleError(
            f"the engine is for {ranks} GPUs, this pod has {gpu.count}",
            remedy="give the pod as many GPUs as spec.engine.tensorParallelSize says, and leave "
            "CUDA_VISIBLE_DEVICES out",
        )
    if ranks > 1 and device.shared_memory() < _SHARED_MEMORY_BYTES:
        raise errors.EngineIncompatibleError(
            f"ranks talk through /dev/shm, which has {device.shared_memory() >> 20} MiB here and "
            f"needs {_SHARED_MEMORY_BYTES >> 20} MiB",
            remedy="mount an emptyDir with medium Memory and a sizeLimit of 2Gi at /dev/shm",
        )
    wanted = device.wanted_cuda_major(backend)
    if wanted and gpu.cuda_major < wanted:
        raise errors.EngineIncompatibleError(
            f"the node's driver {gpu.driver} serves CUDA {gpu.cuda_major}, "
            f"this image's libraries want CUDA {wanted}",
            remedy="update the driver of the node (CUDA 13 begins with driver 580), or serve on "
            "another one",
        )


def _check_device(inputs: Any) -> None:
    here = {
        "architecture": device.architecture_like(inputs["architecture"]),
        "versions": device.versions(inputs["backend"], inputs["architecture"]),
        "engineFormat": keys.ENGINE_FORMAT,
    }
    for field, found in here.items():
        if inputs[field] != found:
            raise errors.EngineIncompatibleError(
                f"the engine was built for {field} {inputs[field]}, this pod has {found}",
                remedy="use the image that the engine was built with, or take over the new images "
                "with the annotation serving.internvl.dev/upgrade: a fitting engine is built then",
            )


def _camel_case(name: str) -> str:
    first, *rest = name.split("_")
    return first + "".join(part.capitalize() for part in rest)
