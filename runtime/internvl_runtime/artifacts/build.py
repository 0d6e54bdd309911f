"""Builds an engine: packs what serving needs, answers with it, and publishes it."""

import dataclasses
import importlib.util
import json
import shutil
import time
from collections.abc import Mapping

from internvl_runtime import errors
from internvl_runtime.artifacts import progress
from internvl_runtime.engine import device, folder, interface
from internvl_runtime.model import config, tokenizer
from internvl_runtime.store import cache as caches
from internvl_runtime.store import keys


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
    inputs = spec.inputs()
    key = keys.key_of(keys.Kind.ENGINES, inputs)
    with cache.workspace(keys.Kind.ENGINES, key) as workspace:
        published = cache.find(keys.Kind.ENGINES, key)
        if published:
            return published
        caches.clear(workspace)
        started = time.monotonic()
        checkpoint = cache.get(keys.Kind.CHECKPOINTS, spec.checkpoint)
        with caches.naming_a_full_disk(cache.root):
            shutil.copytree(
                checkpoint.path / folder.MODEL_FOLDER,
                workspace / folder.MODEL_FOLDER,
                dirs_exist_ok=True,
            )
            recorded = _verify(spec, checkpoint, stage)
            text = json.dumps(recorded, indent=2) + "\n"
            (workspace / folder.VERIFICATION).write_text(text, encoding="utf-8")
            return cache.publish(
                workspace,
                kind=keys.Kind.ENGINES,
                inputs=inputs,
                references=[caches.Reference(keys.Kind.CHECKPOINTS.value, spec.checkpoint)],
                provenance={"buildSeconds": round(time.monotonic() - started, 1)},
            )


def check_environment(spec: EngineSpec) -> None:
    """Compare the wanted backend, architecture and versions with this image and machine."""
    if spec.backend != "PyTorch" or not spec.architecture.startswith("cpu-"):
        raise errors.StageError(
            errors.Reason.INVALID_SPEC,
            f"backend {spec.backend} for {spec.architecture} is not offered by this version",
            remedy="set spec.engine.backend to PyTorch and spec.engine.device to CPU",
        )
    if importlib.util.find_spec("torch") is None:
        raise errors.StageError(
            errors.Reason.INCOMPATIBLE_VERSIONS,
            "this image has no torch",
            remedy="use the runtime image that belongs to the operator's release",
        )
    here = {"architecture": device.cpu_architecture(), **device.versions(spec.backend)}
    wanted = {"architecture": spec.architecture, **spec.versions}
    if here != wanted:
        raise errors.StageError(
            errors.Reason.INCOMPATIBLE_VERSIONS,
            f"the engine is wanted for {wanted}, this builder has {here}",
            remedy="use the runtime image that belongs to the operator's release",
        )


def _verify(
    spec: EngineSpec, checkpoint: caches.Published, stage: progress.Progress
) -> list[dict[str, object]]:
    from internvl_runtime.engine import verification
    from internvl_runtime.engine.pytorch import loading

    report = stage.step("verify", unit="prompts")
    model_folder = checkpoint.path / folder.MODEL_FOLDER
    model = config.read_model_config(model_folder)
    tokens = tokenizer.load_tokenizer(model_folder, model)
    report(0, 1)
    loaded = loading.load_engine(
        checkpoint.path,
        model,
        dataclasses.replace(spec.limits, max_batch_size=1),
        options=loading.Options(device=device.default_device()),
    )
    recorded = verification.record(loaded, model, tokens)
    report(1, 1)
    return [dataclasses.asdict(entry) for entry in recorded]
