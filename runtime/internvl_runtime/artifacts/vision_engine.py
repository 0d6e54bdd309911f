"""The vision tower as a TensorRT engine (10.14), strongly typed in the checkpoint's dtype.

Written against the published Python API, and never run where this was written:
there it is held by the signatures of the real binding (`tests/contract`).
"""

import dataclasses
from pathlib import Path
from typing import Any

from internvl_runtime import errors
from internvl_runtime.artifacts import layout, progress, safetensors_file, vision_onnx
from internvl_runtime.engine import interface
from internvl_runtime.model import config


@dataclasses.dataclass(frozen=True)
class Profile:
    """How many tiles one pass may have, and for how many it is tuned."""

    most: int
    """All tiles of a request: several waiting requests fill a pass up."""
    tuned: int
    """Those of one picture with its thumbnail."""

    @classmethod
    def of(cls, limits: interface.EngineLimits) -> "Profile":
        """Return the profile for the limits of an engine."""
        most = limits.max_tiles_per_request
        return cls(most, min(limits.max_tiles_per_image + 1, most))

    def shapes(self) -> list[tuple[int, int, int, int]]:
        """Return the least, the tuned and the largest input."""
        size = config.TILE_SIZE
        return [(tiles, 3, size, size) for tiles in (1, self.tuned, self.most)]


def build(
    checkpoint: Path,
    model: config.ModelConfig,
    output: Path,
    *,
    profile: Profile,
    timing_cache: Path,
    report: progress.Report,
) -> None:
    """Write the engine of a checkpoint's `vision.safetensors`; raises StageError (BuildFailed).

    What is measured stays in `timing_cache` for the next build on the same GPU.
    """
    import tensorrt

    logger = tensorrt.Logger(tensorrt.Logger.WARNING)
    builder = tensorrt.Builder(logger)
    strongly_typed = tensorrt.NetworkDefinitionCreationFlag.STRONGLY_TYPED
    network = builder.create_network(1 << int(strongly_typed))
    _parse(tensorrt.OnnxParser(network, logger), checkpoint, model)
    settings = builder.create_builder_config()
    shapes = builder.create_optimization_profile()
    shapes.set_shape(vision_onnx.INPUT, *profile.shapes())
    if settings.add_optimization_profile(shapes) < 0:
        raise _failed(f"TensorRT refuses the profile {profile}")
    measured = timing_cache.read_bytes() if timing_cache.exists() else b""
    kept = settings.create_timing_cache(measured)
    # One of another GPU or version is of no use, and no reason to fail.
    if not settings.set_timing_cache(kept, False):
        settings.set_timing_cache(settings.create_timing_cache(b""), False)
    settings.progress_monitor = _monitor(tensorrt, report)
    plan = builder.build_serialized_network(network, settings)
    if plan is None:
        raise _failed("TensorRT built no engine of the vision tower; its log says why")
    output.write_bytes(memoryview(plan))
    timing_cache.parent.mkdir(parents=True, exist_ok=True)
    timing_cache.write_bytes(memoryview(settings.get_timing_cache().serialize()))


def _parse(parser: Any, checkpoint: Path, model: config.ModelConfig) -> None:
    stored = safetensors_file.read_header(checkpoint / layout.VISION_FILE)
    graph = vision_onnx.write_graph(model, stored).SerializeToString()
    # The path tells where the weights lie; there is no file of this name.
    if not parser.parse(graph, str(checkpoint / "vision.onnx")):
        told = [str(parser.get_error(index)) for index in range(parser.num_errors)]
        raise _failed(f"TensorRT can not read the vision tower's graph: {'; '.join(told)}")


def _failed(message: str) -> errors.StageError:
    return errors.StageError(
        errors.Reason.BUILD_FAILED,
        message,
        remedy="use the builder image of TensorRT-LLM 1.2.1; if it stays so, report the log",
    )


def _monitor(tensorrt: Any, report: progress.Report) -> Any:
    """Return TensorRT's progress monitor, which reports the steps of its outermost phase."""

    class Monitor(tensorrt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self._phases: list[tuple[str, int]] = []

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            del parent_phase
            self._phases.append((phase_name, num_steps))

        def step_complete(self, phase_name: str, step: int) -> bool:
            (outermost, steps), *_ = self._phases
            if phase_name == outermost:
                report(min(step + 1, steps), steps)
            return True

        def phase_finish(self, phase_name: str) -> None:
            self._phases = [phase for phase in self._phases if phase[0] != phase_name]

    return Monitor()
