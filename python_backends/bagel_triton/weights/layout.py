"""Layout of a module's weights in one piece of memory, and the key that identifies them.

A parameter may hold several of the checkpoint's tensors, such as the projections of queries,
keys and values: they are its *source*, and become one tensor on the way.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from bagel_triton.model.quantization import Form
from bagel_triton.weights.files import FileIdentity, drop_pages
from bagel_triton.weights.validation import NotFinite, is_finite

AT_ONCE = 1 << 20  # weights that are quantised at once, with some intermediates in float32


@dataclass(frozen=True)
class Adapted:
    """A stored tensor [rows, inner] with an update of low rank: ``weight + up @ down``, computed in float32.

    ``down`` is [rank, inner] and ``up`` [rows, rank], float32 both.
    """

    weight: Tensor
    down: Tensor
    up: Tensor

    @property
    def shape(self) -> torch.Size:
        """That of the weight."""
        return self.weight.shape

    def __len__(self) -> int:
        return len(self.weight)

    def rows(self, rows: slice) -> Tensor:
        """The sum's ``rows``."""
        return torch.addmm(self.weight[rows].float(), self.up[rows], self.down)


Part = Tensor | Adapted
#: Source of a parameter: a stored tensor, or several, the second's rows below the first's and so on.
Dense = Part | tuple[Part, ...]


@dataclass(frozen=True)
class Quantized:
    """A weight in ``form``: stored so, with its scales, or quantised on the way where it has no ``scale``."""

    form: Form
    weight: Dense
    scale: Dense | None = None


Source = Dense | Quantized


def parts_of(source: Dense) -> tuple[Part, ...]:
    """The parts of ``source``, top to bottom."""
    return source if isinstance(source, tuple) else (source,)


def stored_of(source: Source) -> list[Tensor]:
    """The tensors of the checkpoint that ``source`` is read from."""
    if isinstance(source, Quantized):
        return [*stored_of(source.weight), *([] if source.scale is None else stored_of(source.scale))]
    return [part.weight if isinstance(part, Adapted) else part for part in parts_of(source)]


def shape_of(source: Dense) -> tuple[int, ...]:
    """The shape of the parameter that is read from ``source``."""
    parts = parts_of(source)
    return tuple(parts[0].shape) if len(parts) == 1 else (sum(map(len, parts)), *parts[0].shape[1:])


def tensors_of(name: str, source: Source, dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """The shape and dtype of each tensor that ``source`` becomes, by name; numbers that are not stored in codes are
    converted to ``dtype``."""
    if not isinstance(source, Quantized):
        return {name: (shape_of(source), dtype)}
    if source.scale is None:
        rows, inner = shape_of(source.weight)
        found = source.form.tensors(rows, inner)
    else:
        rows, bytes_ = shape_of(source.weight)
        found = source.form.tensors(rows, bytes_ * 8 // source.form.bits)
    return {f"{name.removesuffix('weight')}{kind}": tensor for kind, tensor in found.items()}


def as_stored(name: str, source: Source, dtype: torch.dtype) -> dict[str, Tensor] | None:
    """The tensors of ``source`` where they are stored just as they are wanted; else None."""
    wanted = tensors_of(name, source, dtype)
    stored = (source.weight, source.scale) if isinstance(source, Quantized) else (source,)
    found = {
        tensor: part
        for (tensor, (_, kind)), part in zip(wanted.items(), stored, strict=True)
        if isinstance(part, Tensor) and part.dtype == kind
    }
    return found if len(found) == len(wanted) else None


def check_finite(parameter: str, source: Source) -> None:
    """Read every value of ``source``, which the parameter is loaded from.

    Raises:
        NotFinite: one is NaN or infinite.
    """
    if not all(is_finite(part) for part in stored_of(source)):
        raise NotFinite(parameter)


def read_into(targets: Sequence[Tensor], source: Source) -> None:
    """Copy ``source`` into ``targets``, one for each of :func:`tensors_of`, converting it on the way."""
    if not isinstance(source, Quantized):
        _copy(targets[0], source)
        return
    weight, scale = targets
    if source.scale is not None:
        _copy(weight, source.weight)
        _copy(scale, source.scale)
        return
    for place, rows in _pieces(source.weight):
        weight[place], scale[place] = source.form.encode(rows.to(weight.device, torch.float32))


def _copy(target: Tensor, source: Dense) -> None:
    if isinstance(source, Tensor):
        target.copy_(source)
        return
    for place, rows in _pieces(source):
        target[place].copy_(rows)


def _pieces(source: Dense) -> Iterator[tuple[slice, Tensor]]:
    """The rows of ``source``, about ``AT_ONCE`` numbers at a time, and their place in the parameter."""
    start = 0
    for part in parts_of(source):
        step = max(AT_ONCE // math.prod(part.shape[1:]), 1)
        for first in range(0, len(part), step):
            rows = slice(first, min(first + step, len(part)))
            place = slice(start + rows.start, start + rows.stop)
            yield place, part.rows(rows) if isinstance(part, Adapted) else part[rows]
        start += len(part)


@dataclass(frozen=True)
class Slot:
    """Location of one tensor of ``source``: ``offset`` in bytes. ``form`` is that of quantised weights."""

    name: str
    source: str
    shape: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    form: str = ""


@dataclass(frozen=True)
class Layout:
    """Locations of tensors in ``size`` bytes; equal sources have equal layouts."""

    slots: tuple[Slot, ...]
    size: int

    @classmethod
    def of(cls, sources: Mapping[str, Source], dtype: torch.dtype, alignment: int) -> Self:
        """``sources`` one after the other in ``dtype``, each at a multiple of ``alignment`` bytes; none is read."""
        slots, end = [], 0
        for source_name, source in sources.items():
            form = source.form.storage if isinstance(source, Quantized) else ""
            for name, (shape, kind) in tensors_of(source_name, source, dtype).items():
                offset = -(-end // alignment) * alignment
                slots.append(Slot(name, source_name, shape, offset, kind, form))
                end = offset + math.prod(shape) * kind.itemsize
        return cls(tuple(slots), end)

    def key(self, files: tuple[FileIdentity, ...], device: str) -> str:
        """16 hexadecimal digits: a digest of this layout, of the ``files`` it is read from and of the ``device``."""
        return hashlib.sha256(repr((files, self, device)).encode()).hexdigest()[:16]

    def views(self, contents: Tensor) -> dict[str, Tensor]:
        """The tensors in ``contents``, uint8 [size], by name."""
        return {
            slot.name: contents[slot.offset : slot.offset + math.prod(slot.shape) * slot.dtype.itemsize]
            .view(slot.dtype)
            .view(slot.shape)
            for slot in self.slots
        }

    def fill(self, contents: Tensor, sources: Mapping[str, Source]) -> None:
        """Copy every source, in order, to its slot in ``contents``, converting it on the way.

        Raises:
            NotFinite: one has values that are NaN or infinite.
        """
        views = self.views(contents)
        for name, slots in itertools.groupby(self.slots, lambda slot: slot.source):
            source = sources[name]
            check_finite(name, source)
            read_into([views[slot.name] for slot in slots], source)
            drop_pages(stored_of(source))
