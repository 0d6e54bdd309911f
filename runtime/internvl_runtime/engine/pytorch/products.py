"""Products with weights (out, in) as a checkpoint holds them: in the engine's dtype, or in FP8."""

import dataclasses

import torch
import torch.nn.functional as F  # noqa: N812

from internvl_runtime.engine.pytorch import weights as loading

_FP8 = torch.float8_e4m3fn
_MOST = torch.finfo(_FP8).max
_LEAST_SCALE = 1.0 / (_MOST * 512.0)
"""As TensorRT-LLM quantizes a token (`quantize_fp8_per_token`)."""


@dataclasses.dataclass(frozen=True)
class Product:
    """`x @ weight.T + bias`; with scales, weight rows and tokens are FP8 with a scale each."""

    weight: torch.Tensor
    scales: torch.Tensor | None = None
    """float32 [out]."""
    bias: torch.Tensor | None = None

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        """Multiply states [T, in]."""
        if self.scales is None:
            return F.linear(states, self.weight, self.bias)
        return _multiply_fp8(states, self.weight, self.scales, self.bias)


def read(weights: loading.Weights, name: str) -> Product:
    """Return the product of a linear layer."""
    return Product(
        weights[f"{name}.weight"],
        weights.get(f"{name}.per_channel_scale"),
        weights.get(f"{name}.bias"),
    )


def read_stacked(weights: loading.Weights, *names: str) -> Product:
    """Return one product for layers of the same input, their outputs side by side."""
    parts = [weights.pop(f"{name}.weight") for name in names]
    scales = [weights.get(f"{name}.per_channel_scale") for name in names]
    # torch joins no FP8 tensors: their bytes are joined.
    joined = torch.cat([part.view(torch.uint8) if part.dtype is _FP8 else part for part in parts])
    if scales[0] is None:
        return Product(joined)
    return Product(joined.view(_FP8), torch.cat([scale for scale in scales if scale is not None]))


def quantize_tokens(states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return states [T, in] in FP8, and float32 scales [T, 1]."""
    wide = states.float()
    scales = (wide.abs().amax(-1, keepdim=True) / _MOST).clamp(min=_LEAST_SCALE)
    return (wide / scales).clamp(-_MOST, _MOST).to(_FP8), scales


def _multiply_fp8(
    states: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    quantized, own = quantize_tokens(states)
    if states.device.type == "cuda" and states.dtype is torch.bfloat16:
        product = torch._scaled_mm(
            quantized, weight.t(), own, scales.unsqueeze(0), out_dtype=torch.bfloat16
        )
    else:
        product = (F.linear(quantized.float(), weight.float()) * own * scales).to(states.dtype)
    return product if bias is None else product + bias
