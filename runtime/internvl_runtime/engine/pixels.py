"""Tiles as the vision tower takes them, on the tower's device."""

import torch

from internvl_runtime.engine import transfer
from internvl_runtime.model import config

TILE_SHAPE = (config.TILE_SIZE, config.TILE_SIZE, 3)
"""Of the uint8 pixels of one tile."""
_MEAN = (0.485, 0.456, 0.406)
_STD = (0.229, 0.224, 0.225)


def normalize(tiles: torch.Tensor, *, dtype: torch.dtype) -> torch.Tensor:
    """Scale, normalize in float32 and round once: uint8 NHWC to `dtype` NCHW."""
    pixels = tiles.permute(0, 3, 1, 2).to(torch.float32) / 255
    scales = transfer.upload(torch.tensor([_MEAN, _STD]), tiles.device)
    mean, std = scales.view(2, 3, 1, 1).unbind()
    return ((pixels - mean) / std).to(dtype)
