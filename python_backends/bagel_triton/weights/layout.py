"""How the weights of a module are laid out in one piece of memory, and the key that identifies them.

A parameter may hold several of the checkpoint's tensors, such as the projections of queries,
keys and values: they are its *source*, and become one tensor on the way.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from bagel_triton.weights.files import FileIdentity
from bagel_triton.weights.validation import NotFinite, is_finite

#: What a parameter is read from: a stored tensor, or several, the second's rows below the first's and so on.
Source = Tensor | tuple[Tensor, ...]


def parts_of(source: Source) -> tuple[Tensor, ...]:
    """The stored tensors of ``source``."""
    return (source,) if isinstance(source, Tensor) else source


def shape_of(source: Source) -> tuple[int, ...]:
    """The shape of the parameter that is read from ``source``."""
    if isinstance(source, Tensor):
        return tuple(source.shape)
    return (sum(len(part) for part in source), *source[0].shape[1:])


def check_finite(parameter: str, source: Source) -> None:
    """Read every value of ``source``, which the parameter is loaded from.

    Raises:
        NotFinite: one is NaN or infinite.
    """
    if not all(is_finite(part) for part in parts_of(source)):
        raise NotFinite(parameter)


def read_into(target: Tensor, source: Source) -> None:
    """Copy ``source`` into ``target``, converting it on the way."""
    if isinstance(source, Tensor):
        target.copy_(source)
        return
    for part, rows in zip(source, target.split([len(part) for part in source]), strict=True):
        rows.copy_(part)


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
    def of(cls, sources: Mapping[str, Source], dtype: torch.dtype, alignment: int) -> Self:
        """``sources`` one after the other in ``dtype``, each at a multiple of ``alignment`` bytes; none is read."""
        slots, end = [], 0
        for name, source in sources.items():
            offset, shape = -(-end // alignment) * alignment, shape_of(source)
            slots.append(Slot(name, shape, offset))
            end = offset + math.prod(shape) * dtype.itemsize
        return cls(dtype, tuple(slots), end)

    def key(self, files: tuple[FileIdentity, ...], device: str) -> str:
        """16 hexadecimal digits: a digest of this layout, of the ``files`` it is read from and of the ``device``."""
        return hashlib.sha256(repr((files, self, device)).encode()).hexdigest()[:16]

    def views(self, contents: Tensor) -> dict[str, Tensor]:
        """The tensors in ``contents``, uint8 [size], by name."""
        return {
            slot.name: contents[slot.offset : slot.offset + math.prod(slot.shape) * self.dtype.itemsize]
            .view(self.dtype)
            .view(slot.shape)
            for slot in self.slots
        }

    def fill(self, contents: Tensor, sources: Mapping[str, Source]) -> None:
        """Copy every source, in order, to its slot in ``contents``, converting it on the way.

        Raises:
            NotFinite: one has values that are NaN or infinite.
        """
        for name, target in self.views(contents).items():
            source = sources[name]
            check_finite(name, source)
            read_into(target, source)
