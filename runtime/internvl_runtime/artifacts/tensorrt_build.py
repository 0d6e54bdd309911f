"""Both engines of TensorRT and TensorRT-LLM in one self-contained folder."""

import shutil
from pathlib import Path
from typing import Any

from internvl_runtime import errors
from internvl_runtime.artifacts import journal, language_engine, progress, vision_engine
from internvl_runtime.engine import device, interface
from internvl_runtime.engine.tensorrt import built as builts
from internvl_runtime.model import config

_VISION, _LANGUAGE = "vision", "language"


def build(
    checkpoint: Path,
    model: config.ModelConfig,
    workspace: Path,
    limits: interface.EngineLimits,
    *,
    dtype: str,
    quantization: str,
    ranks: int,
    built: journal.Journal,
    timings: Path,
    stage: progress.Progress,
) -> dict[str, Any]:
    """Build what the workspace has not yet; return what the manifest tells of it.

    `built` names what a killed build has finished, `timings` is a folder of measurements that
    later builds on this GPU use. Raises StageError for a combination that TensorRT-LLM is not
    known to load.
    """
    if quantization == "FP8" and model.language.family is config.Family.QWEN2:
        raise errors.StageError(
            errors.Reason.INVALID_SPEC,
            "FP8 weights of the Qwen2 family: no published source shows that TensorRT-LLM 1.2.1 "
            "loads them",
            remedy="set spec.engine.quantization to None, or spec.engine.backend to PyTorch",
        )
    timings.mkdir(parents=True, exist_ok=True)
    profile = vision_engine.Profile.of(limits)
    if _VISION not in built.done:
        vision_engine.build(
            checkpoint,
            model,
            workspace / builts.VISION_FILE,
            profile=profile,
            timing_cache=timings / "vision",
            report=stage.step("vision", unit="steps"),
        )
        built.add(_VISION)
    output = workspace / builts.LANGUAGE_FOLDER
    arguments = language_engine.command(
        checkpoint,
        output,
        limits,
        dtype=dtype,
        workers=min(ranks, device.gpu_count()),
        timing_cache=timings / "language",
    )
    if _LANGUAGE not in built.done:
        shutil.rmtree(output, ignore_errors=True)
        language_engine.build(
            arguments, ranks=ranks, output=output, report=stage.step("language", unit="ranks")
        )
        built.add(_LANGUAGE)
    return {"visionProfile": profile.shapes(), "trtllmBuild": arguments[1:]}
