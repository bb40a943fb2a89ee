"""Where the weights of a module lie in one piece of memory, and the key that stands for them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from bagel_triton.weights.files import FileIdentity


@dataclass(frozen=True)
class Slot:
    """Where one tensor lies: ``offset`` in bytes."""

    name: str
    shape: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class Layout:
    """Where tensors of one dtype lie in ``size`` bytes; equal sources have equal layouts."""

    dtype: torch.dtype
    slots: tuple[Slot, ...]
    size: int

    @classmethod
    def of(cls, sources: Mapping[str, Tensor], dtype: torch.dtype, alignment: int) -> Self:
        """``sources`` one after the other in ``dtype``, each at a multiple of ``alignment`` bytes; none is read."""
        slots, end = [], 0
        for name, tensor in sources.items():
            offset = -(-end // alignment) * alignment
            slots.append(Slot(name, tuple(tensor.shape), offset))
            end = offset + tensor.numel() * dtype.itemsize
        return cls(dtype, tuple(slots), end)

    def key(self, files: tuple[FileIdentity, ...], device: str) -> str:
        """16 hexadecimal digits that stand for these tensors, read from ``files``, on ``device``."""
        return hashlib.sha256(repr((files, self, device)).encode()).hexdigest()[:16]

    def views(self, contents: Tensor) -> dict[str, Tensor]:
        """The tensors in ``contents``, uint8 [size], by name."""
        return {
            slot.name: contents[slot.offset : slot.offset + math.prod(slot.shape) * self.dtype.itemsize]
            .view(self.dtype)
            .view(slot.shape)
            for slot in self.slots
        }

    def fill(self, contents: Tensor, sources: Mapping[str, Tensor]) -> None:
        """Read every source once, in order, into its place in ``contents``, converting it on the way."""
        for name, target in self.views(contents).items():
            target.copy_(sources[name])
