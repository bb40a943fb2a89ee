"""Files in memory as a device's memory: like CUDA's, they last as long as a process has them open or mapped."""

from __future__ import annotations

import mmap
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bagel_triton.ipc.cuda_memory import NotShareable
from bagel_triton.weights.files import map_read_only
from bagel_triton.weights.sharing import DeviceWeights
from tests.support.weights import CPU


@dataclass(frozen=True)
class MemfdMemory:
    """A :class:`~bagel_triton.weights.sharing.DeviceMemory` of this machine's CPU, and what goes wrong with it.

    ``gate`` is a file that appears when a copy to the device is about to be complete, and
    that the test removes to let it be.
    """

    name: str = "device"
    gate: Path | None = None
    full: bool = False
    no_export: bool = False
    no_import: bool = False
    alignment: int = 64

    @property
    def device(self) -> torch.device:
        return CPU

    def allocate(self, size: int) -> tuple[int, Tensor]:
        if self.no_export:
            raise NotShareable("it cannot be exported")
        if self.full:
            raise MemoryError("the device is full")
        descriptor = os.memfd_create("weights")
        os.ftruncate(descriptor, size)
        return descriptor, torch.frombuffer(mmap.mmap(descriptor, size), dtype=torch.uint8)

    def open(self, descriptor: int, size: int) -> Tensor:
        if self.no_import:
            raise NotShareable("it cannot be imported")
        contents = map_read_only(descriptor)
        assert contents.numel() == size
        return contents

    def complete(self) -> None:
        if self.gate is not None:
            self.gate.touch()
            while self.gate.exists():
                time.sleep(0.01)

    def weights(self, prefix: str) -> DeviceWeights:
        """Those of the server with ``prefix`` there."""
        return DeviceWeights(prefix, self)
