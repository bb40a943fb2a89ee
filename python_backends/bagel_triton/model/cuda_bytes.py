"""Bytes on a GPU that torch did not allocate, and what names the GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def device_uuid(device: torch.device) -> str:
    """What names a GPU alike in every process, however each of them numbers those it sees."""
    return str(torch.cuda.get_device_properties(device).uuid)


def device_of(uuid: str) -> torch.device | None:
    """The GPU of that UUID as this process numbers it; None where it is not visible here."""
    for index in range(torch.cuda.device_count()):
        if device_uuid(torch.device("cuda", index)) == uuid:
            return torch.device("cuda", index)
    return None


class CudaBytes:
    """``size`` bytes at ``pointer`` on ``device``; whoever made them ends them."""

    def __init__(self, device: torch.device, pointer: int, size: int) -> None:
        self.device, self.pointer, self.size = device, pointer, size

    def tensor(self) -> Tensor:
        """The memory as uint8 [size]: no copy, and it keeps this object."""
        return torch.as_tensor(self, device=self.device)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        # Bytes, because the interface knows no bfloat16.
        return {"shape": (self.size,), "typestr": "|u1", "data": (self.pointer, False), "strides": None, "version": 3}
