"""The vision tower as a TensorRT engine: tiles in, features out, on a stream of its own."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from internvl_runtime import errors
from internvl_runtime.engine import pixels, transfer
from internvl_runtime.model import config


class Tower:
    """One execution context, for one thread."""

    def __init__(self, plan: Path, *, dtype: str, hidden_size: int) -> None:
        """Load a plan; raises StageError where TensorRT refuses it."""
        import tensorrt

        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._dtype = getattr(torch, dtype)
        self._hidden_size = hidden_size
        self._runtime = tensorrt.Runtime(tensorrt.Logger(tensorrt.Logger.WARNING))
        self._engine = self._runtime.deserialize_cuda_engine(plan.read_bytes())
        if self._engine is None:
            raise _refused(f"TensorRT can not read {plan.name}")
        self._input, self._output = _names(tensorrt, self._engine)
        _, _, largest = self._engine.get_tensor_profile_shape(self._input, 0)
        self.most_tiles = int(largest[0])
        """In one pass."""
        self._context = self._engine.create_execution_context()
        if self._context is None:
            raise _refused("TensorRT makes no execution context: as a rule memory is short")
        self._stream = torch.cuda.Stream() if self._device.type == "cuda" else None

    @torch.inference_mode()
    def encode(self, tiles: npt.NDArray[np.uint8]) -> torch.Tensor:
        """Return features [N, 256, hidden] of uint8 tiles [N, 448, 448, 3], on the host.

        N is at most `most_tiles`. Raises EngineUnavailableError where TensorRT fails.
        """
        with torch.cuda.stream(self._stream):
            given = transfer.upload(torch.from_numpy(tiles), self._device)
            normalized = pixels.normalize(given, dtype=self._dtype).contiguous()
            made = torch.empty(
                (len(tiles), config.TOKENS_PER_TILE, self._hidden_size),
                dtype=self._dtype,
                device=self._device,
            )
            self._run(normalized, made)
            fetched = transfer.fetch(made)
            over = transfer.mark(self._device)
        if over:
            over.synchronize()
        return fetched

    def _run(self, given: torch.Tensor, made: torch.Tensor) -> None:
        context, stream = self._context, self._stream.cuda_stream if self._stream else 0
        is_done = (
            context.set_input_shape(self._input, tuple(given.shape))
            and not context.infer_shapes()
            and context.set_tensor_address(self._input, given.data_ptr())
            and context.set_tensor_address(self._output, made.data_ptr())
            and context.execute_async_v3(stream)
        )
        if not is_done:
            raise errors.EngineUnavailableError("the vision engine failed; the log says why")


def _names(tensorrt: Any, engine: Any) -> tuple[str, str]:
    """Return the names of the engine's input and output."""
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    by_mode = {engine.get_tensor_mode(name): name for name in names}
    return by_mode[tensorrt.TensorIOMode.INPUT], by_mode[tensorrt.TensorIOMode.OUTPUT]


def _refused(message: str) -> errors.StageError:
    return errors.EngineIncompatibleError(
        message,
        remedy="serve on the kind of GPU and with the image that the engine was built for, or "
        "build it again",
    )
