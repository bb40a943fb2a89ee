"""A picture's pixels as the networks take them."""

from __future__ import annotations

import torch
from torch import Tensor


def normalised(pixels: bytes, height: int, width: int) -> Tensor:
    """Raw pixels as float32 [height, width, 3] in [-1, 1]."""
    array = torch.frombuffer(bytearray(pixels), dtype=torch.uint8).view(height, width, 3)
    return array.float() / 127.5 - 1.0


def patchified(pixels: Tensor, patch: int) -> Tensor:
    """pixels [height, width, 3] -> [rows * columns, patch * patch * 3], each (row, column, channel)."""
    height, width, channels = pixels.shape
    grid = pixels.view(height // patch, patch, width // patch, patch, channels)  # [h, p, w, q, c]
    return grid.permute(0, 2, 1, 3, 4).reshape(-1, patch * patch * channels)
