"""Builds an engine: packs what serving needs, answers with it, and publishes it."""

import dataclasses
import json
import logging
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from internvl_runtime import errors
from internvl_runtime.artifacts import checkpoint as checkpoints
from internvl_runtime.artifacts import journal, progress, source
from internvl_runtime.engine import device, folder, interface
from internvl_runtime.model import config, tokenizer
from internvl_runtime.store import cache as caches
from internvl_runtime.store import keys

logger = logging.getLogger(__name__)

_JOURNAL = "built-engines"
"""In the workspace, until it is published."""
_TIMINGS = "timings"
"""TensorRT's measurements, which a later build on the same kind of GPU uses."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineSpec:
    """What to build."""

    checkpoint: str
    backend: str
    architecture: str
    versions: Mapping[str, str]
    limits: interface.EngineLimits

    def inputs(self) -> dict[str, object]:
        """Return the inputs of the engine's key."""
        return keys.engine_inputs(
            checkpoint=self.checkpoint,
            backend=self.backend,
            architecture=self.architecture,
            versions=self.versions,
            build=folder.flags_of(self.limits),
        )


def build(spec: EngineSpec, *, cache: caches.Cache, stage: progress.Progress) -> caches.Published:
    """Publish the engine; raises StageError when it can not be built here or answers nonsense."""
    check_environment(spec)
    from internvl_runtime.engine import verification

    inputs = spec.inputs()
    key = keys.key_of(keys.Kind.ENGINES, inputs)
    with cache.workspace(keys.Kind.ENGINES, key) as workspace:
        published = cache.find(keys.Kind.ENGINES, key)
        if published:
            return published
        started = time.monotonic()
        checkpoint = cache.get(keys.Kind.CHECKPOINTS, spec.checkpoint)
        _check_fit(spec, checkpoint)
        folder.check_machine(
            architecture=spec.architecture,
            backend=spec.backend,
            ranks=checkpoint.manifest.inputs["tensorParallelSize"],
        )
        model = config.read_model_config(checkpoint.path / folder.MODEL_FOLDER)
        tokens = tokenizer.load_tokenizer(checkpoint.path / folder.MODEL_FOLDER, model)
        verification.check_limits(spec.limits, model, tokens)
        checkpoints.check(checkpoint.path, model, checkpoint.manifest.inputs)
        with caches.naming_a_full_disk(cache.root):
            shutil.copytree(
                checkpoint.path / folder.MODEL_FOLDER,
                workspace / folder.MODEL_FOLDER,
                dirs_exist_ok=True,
            )
            parts = _build_parts(spec, checkpoint, model, cache, workspace, stage)
            verified = _verify(spec, checkpoint, cache, workspace, stage)
            return cache.publish(
                workspace,
                kind=keys.Kind.ENGINES,
                inputs=inputs,
                references=[caches.Reference(keys.Kind.CHECKPOINTS.value, spec.checkpoint)],
                provenance={
                    "buildSeconds": round(time.monotonic() - started, 1),
                    "machine": device.describe_machine(),
                    **parts,
                    "verification": verified,
                },
                scratch=(_JOURNAL,),
            )


def check_environment(spec: EngineSpec) -> None:
    """Compare the wanted backend, architecture and versions with this image and machine."""
    if spec.backend not in interface.OFFERED:
        raise errors.StageError(
            errors.Reason.INVALID_SPEC,
            f"backend {spec.backend} is not one of {', '.join(interface.OFFERED)}",
            remedy="change spec.engine.backend",
        )
    if spec.backend == "TensorRT" and device.torch_device(spec.architecture) == "cpu":
        raise errors.StageError(
            errors.Reason.UNSUPPORTED_GPU,
            "TensorRT builds on the GPU that serves, and this machine has none",
            remedy="build on a GPU node, or set spec.engine.backend to PyTorch",
        )
    here = device.architecture_like(spec.architecture)
    if here != spec.architecture:
        raise errors.StageError(
            errors.Reason.UNSUPPORTED_GPU,
            f"the engine is wanted for {spec.architecture}, this machine has {here}",
            remedy="build on a node with the GPU that serves: set spec.gpu.product to its kind",
        )
    versions = device.versions(spec.backend, spec.architecture)
    if versions != spec.versions:
        raise errors.StageError(
            errors.Reason.INCOMPATIBLE_VERSIONS,
            f"the engine is wanted for {dict(spec.versions)}, this builder has {versions}",
            remedy="use the runtime image that belongs to the operator's release",
        )


def _check_fit(spec: EngineSpec, checkpoint: caches.Published) -> None:
    inputs = checkpoint.manifest.inputs
    if inputs["quantization"] == "FP8" and not device.has_fp8(spec.architecture):
        raise errors.StageError(
            errors.Reason.UNSUPPORTED_GPU,
            f"{spec.architecture} has no FP8 products: they begin with compute capability 8.9",
            remedy="set spec.engine.quantization to None, or use an Ada, Hopper or later GPU",
        )


def _build_parts(
    spec: EngineSpec,
    checkpoint: caches.Published,
    model: config.ModelConfig,
    cache: caches.Cache,
    workspace: Path,
    stage: progress.Progress,
) -> dict[str, Any]:
    """Build what the backend serves from; return what the manifest tells of it."""
    if spec.backend == "PyTorch":
        return {"kernels": _pack_kernels(spec, checkpoint, workspace, stage)}
    from internvl_runtime.artifacts import tensorrt_build

    inputs = checkpoint.manifest.inputs
    return tensorrt_build.build(
        checkpoint.path,
        model,
        workspace,
        spec.limits,
        dtype=inputs["dtype"],
        quantization=inputs["quantization"],
        ranks=inputs["tensorParallelSize"],
        built=journal.Journal(workspace / _JOURNAL),
        timings=cache.root / _TIMINGS / f"{spec.architecture}-{spec.versions['tensorrt']}",
        stage=stage,
    )


def _pack_kernels(
    spec: EngineSpec, checkpoint: caches.Published, workspace: Path, stage: progress.Progress
) -> list[str]:
    """Compile what can be compiled ahead: nothing on a CPU."""
    if device.torch_device(spec.architecture) == "cpu":
        return []
    from internvl_runtime.artifacts import kernels

    scratch = workspace.with_name(f"{workspace.name}-compiled")
    model = config.read_model_config(checkpoint.path / folder.MODEL_FOLDER)
    modules = kernels.pack(
        model.language,
        dtype=checkpoint.manifest.inputs["dtype"],
        ranks=checkpoint.manifest.inputs["tensorParallelSize"],
        output=workspace / folder.KERNELS_FOLDER,
        scratch=scratch,
        report=stage.step("kernels", unit="objects"),
    )
    shutil.rmtree(scratch, ignore_errors=True)
    return modules


def _verify(
    spec: EngineSpec,
    checkpoint: caches.Published,
    cache: caches.Cache,
    workspace: Path,
    stage: progress.Progress,
) -> dict[str, object]:
    """Answer, compare with the published weights, record; return what the manifest tells of it."""
    import torch

    from internvl_runtime.artifacts import answering, reference, verify

    model = config.read_model_config(checkpoint.path / folder.MODEL_FOLDER)
    report = stage.step("answer", unit="prompts")
    report(0, 1)
    made = answering.answer(workspace, spec.inputs(), cache)
    report(1, 1)
    answers = made.answers
    told = {"answerSeconds": made.seconds, **made.memory}
    recorded = [dataclasses.asdict(each.record()) for each in answers]
    text = json.dumps(recorded, indent=2) + "\n"
    (workspace / folder.VERIFICATION).write_text(text, encoding="utf-8")
    weights = _weights_folder(checkpoint, cache)
    if weights is None:
        logger.warning("the published weights are not at hand: the answers are not compared")
        return {**told, "compared": None}
    encoding = checkpoint.manifest.inputs
    compared = verify.compare(
        answers,
        weights,
        model,
        lane=reference.Lane(getattr(torch, encoding["dtype"]), encoding["quantization"] == "FP8"),
        device="cuda" if torch.cuda.is_available() else "cpu",
        report=stage.step("compare", unit="layers"),
    )
    return {**told, "compared": [dataclasses.asdict(each) for each in compared]}


def _weights_folder(checkpoint: caches.Published, cache: caches.Cache) -> Path | None:
    weights = cache.find(keys.Kind.WEIGHTS, checkpoint.manifest.inputs["weights"])
    found = source.weights_folder(weights) if weights else None
    return found if found and found.is_dir() else None
