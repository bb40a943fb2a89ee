"""LoRA adapters that some rows of a batch have: products of low rank beside the layers' own.

The weights stay as they are, quantised ones too, so rows of several adapters and rows without one are in one batch.
Arithmetic is that of PEFT (arXiv 2106.09685): ``x @ W.T + (x @ down.T) @ up.T``, with the adapter's scaling in
``down``. To merge it rounds otherwise, so results are those of merged weights to rounding.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple
from weakref import ref

from torch import Tensor

Projection = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

QKV: tuple[Projection, Projection, Projection] = ("q_proj", "k_proj", "v_proj")
GATE_UP: tuple[Projection, Projection] = ("gate_proj", "up_proj")


class LowRank(NamedTuple):
    """An update of one projection: ``down`` [rank, in] times the adapter's scaling, and ``up`` [out, rank]."""

    down: Tensor
    up: Tensor


@dataclass(frozen=True, eq=False)
class LoraAdapter:
    """The adapter ``name``: each layer's updates, by projection and whether they are the generation expert's.

    ``number`` is its own in this process, so what was computed with an earlier one of that name is not taken for its.
    """

    name: str
    layers: Sequence[Mapping[tuple[bool, Projection], LowRank]]
    number: int = field(default_factory=itertools.count().__next__)

    @property
    def nbytes(self) -> int:
        """Bytes of all of its tensors."""
        return sum(tensor.nbytes for layer in self.layers for update in layer.values() for tensor in update)


class AdaptedRows(NamedTuple):
    """Rows ``start:stop`` that have an ``adapter``."""

    start: int
    stop: int
    adapter: LoraAdapter


def adapted_rows(spans: Sequence[tuple[int, int, LoraAdapter | None]]) -> tuple[AdaptedRows, ...]:
    """The rows with an adapter of spans (start, stop, adapter); adjacent ones of an adapter in one."""
    joined: list[AdaptedRows] = []
    for start, stop, adapter in sorted(spans, key=lambda span: span[0]):
        if adapter is None:
            continue
        if joined and joined[-1].stop == start and joined[-1].adapter is adapter:
            joined[-1] = AdaptedRows(joined[-1].start, stop, adapter)
        else:
            joined.append(AdaptedRows(start, stop, adapter))
    return tuple(joined)


WeakRows = tuple[tuple[int, int, ref[LoraAdapter]], ...]


def weakly(adapted: Sequence[AdaptedRows]) -> WeakRows:
    """``adapted`` as a key that does not keep an adapter: that of a dead one equals no other."""
    return tuple((start, stop, ref(adapter)) for start, stop, adapter in adapted)


def strongly(rows: WeakRows) -> tuple[AdaptedRows, ...]:
    """The rows again; their adapters must be alive."""
    alive = [(start, stop, known()) for start, stop, known in rows]
    return tuple(AdaptedRows(start, stop, adapter) for start, stop, adapter in alive if adapter is not None)


def within(adapted: Sequence[AdaptedRows], rows: slice) -> tuple[AdaptedRows, ...]:
    """Cut ``adapted`` to ``rows``, counted from their start."""
    return tuple(
        AdaptedRows(max(start, rows.start) - rows.start, min(stop, rows.stop) - rows.start, adapter)
        for start, stop, adapter in adapted
        if start < rows.stop and stop > rows.start
    )


@dataclass(frozen=True)
class LayerUpdates:
    """The updates of the adapters of ``rows`` to one expert's projections in the layer number ``layer``.

    ``add(x, update, out)`` adds an update of x [rows, in] to ``out`` [rows, out].
    """

    layer: int
    gen: bool
    rows: Sequence[AdaptedRows]
    add: Callable[[Tensor, LowRank, Tensor], None]

    def __call__(self, projection: Projection, x: Tensor, out: Tensor) -> None:
        """Add them to ``out`` [rows, out], the projection of x [rows, in]."""
        for start, stop, adapter in self.rows:
            update = adapter.layers[self.layer].get((self.gen, projection))
            if update is not None:
                self.add(x[start:stop], update, out[start:stop])
