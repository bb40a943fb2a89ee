"""Layouts say which part of a forward a rank computes: all rows, its sequences, or a share of the rows of either.

A layout holds all inputs of a forward but its tensors. That of the DiT changes when images join, leave or change their
branches, so it is sent once, and the steps between carry embeddings alone. That of the thinker changes every step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Self

import msgspec
import numpy as np
import torch
from torch import Tensor

from bagel_triton.kv.store import PagedStep, WorkspaceStep
from bagel_triton.model.attention import QuerySpan
from bagel_triton.model.mot import PackedBatch
from bagel_triton.parallel.sizes import Sizes

Run = tuple[int, int]  # consecutive slots, (start, stop)


class Layout(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A :class:`PackedBatch` without its tensors."""

    tokens: int
    gen_rows: int
    wanted: tuple[int, int] | None
    spans: tuple[QuerySpan, ...]

    def batch(self, cos: Tensor, sin: Tensor) -> PackedBatch:
        """The batch, with its rotary tables."""
        return PackedBatch(self.gen_rows, cos, sin, None if self.wanted is None else slice(*self.wanted))


class PoolLayout(Layout, frozen=True, forbid_unknown_fields=True, tag=True):
    """And its :class:`PagedStep`: where new tokens go and where each sequence is, in the KV cache."""

    writes: tuple[Run, ...]
    sequences: tuple[tuple[Run, ...], ...]

    @classmethod
    def of(cls, batch: PackedBatch, kv: PagedStep) -> Self:
        """All of a forward of the thinker."""
        sequences = tuple(map(_runs, kv.sequences))
        return cls(batch.tokens, batch.gen_rows, _wanted(batch), tuple(kv.spans), _runs(kv.write_slots), sequences)

    def kv(self, store: Tensor) -> PagedStep:
        """Its keys and values in ``store``, the KV cache's or a part of its heads."""
        device = store.device
        sequences = [slice(*runs[0]) if len(runs) == 1 else _slots(runs).to(device) for runs in self.sequences]
        return PagedStep(self.spans, store, _slots(self.writes).to(device), sequences, device)


class StoresLayout(Layout, frozen=True, forbid_unknown_fields=True, tag=True):
    """And its :class:`WorkspaceStep`; ``stores`` are numbers of stores."""

    stores: tuple[int, ...]
    writes: tuple[tuple[tuple[int, int, int], ...], ...]

    @classmethod
    def of(cls, batch: PackedBatch, kv: WorkspaceStep, stores: Sequence[int]) -> Self:
        """All of a forward of the DiT; ``stores`` are the numbers of each sequence's store."""
        writes = tuple(map(tuple, kv.writes))
        return cls(batch.tokens, batch.gen_rows, _wanted(batch), tuple(kv.spans), tuple(stores), writes)

    def kv(self, stores: Mapping[int, Tensor]) -> WorkspaceStep:
        """Its keys and values in ``stores``, by number."""
        return WorkspaceStep(self.spans, [stores[number] for number in self.stores], self.writes)


NOTHING = PoolLayout(0, 0, None, (), (), ())


def _wanted(batch: PackedBatch) -> tuple[int, int] | None:
    return None if batch.wanted is None else (batch.wanted.start, batch.wanted.stop)


def _runs(slots: slice | Tensor) -> tuple[Run, ...]:
    if isinstance(slots, slice):
        return ((slots.start, slots.stop),)
    numbers = slots.cpu().numpy()
    edges = [0, *(np.flatnonzero(np.diff(numbers) != 1) + 1).tolist(), len(numbers)]
    return tuple((int(numbers[first]), int(numbers[last - 1]) + 1) for first, last in pairwise(edges) if first < last)


def _slots(runs: Sequence[Run]) -> Tensor:
    return torch.cat([torch.arange(*run) for run in runs]) if runs else torch.empty(0, dtype=torch.int64)


@dataclass(frozen=True)
class Share:
    """The rows of a layout that a rank computes, int64, sorted by expert, and which of them are ``wanted``."""

    rows: Tensor
    gen_rows: int
    wanted: slice

    @classmethod
    def all_of(cls, layout: Layout, ranks: int) -> list[Share]:
        """Those of ``ranks``, of each about as many; some may be empty."""
        first, stop = layout.wanted or (0, layout.tokens)
        gen = torch.arange(layout.gen_rows).tensor_split(ranks)
        und = torch.arange(layout.gen_rows, layout.tokens).tensor_split(ranks)
        shares = []
        for one, other in zip(gen, reversed(und), strict=True):
            rows = torch.cat((one, other))
            wanted = slice(int((rows < first).sum()), int((rows < stop).sum()))
            shares.append(cls(rows, len(one), wanted))
        return shares


@dataclass(frozen=True)
class Part:
    """One rank's part of a forward: its group's layout, and its ``rows`` of the whole batch, int64; None for all.

    ``returned`` are the rows of the whole batch whose hidden states it sends to rank 0.
    """

    layout: PoolLayout | StoresLayout
    rows: Tensor | None = None
    returned: Tensor | None = None

    def on(self, device: torch.device) -> Part:
        """The same, with its numbers on ``device``."""
        rows, returned = (None if x is None else x.to(device) for x in (self.rows, self.returned))
        return Part(self.layout, rows, returned)

    def of(self, x: Tensor) -> Tensor:
        """The rank's rows of x [tokens, ...]."""
        return x if self.rows is None else x[self.rows]


def parts_of(layouts: Sequence[tuple[PoolLayout | StoresLayout, Tensor | None]], sizes: Sizes) -> list[Part]:
    """Every rank's part; ``layouts`` are those of each cfg group and their rows of the whole batch, None for all."""
    shares = [Share.all_of(layout, sizes.ulysses) for layout, _ in layouts]
    parts = []
    for place in map(sizes.place, range(sizes.ranks)):
        layout, rows = layouts[place.cfg]
        if sizes.cfg * sizes.ulysses == 1:
            parts.append(Part(layout))
            continue
        share = shares[place.cfg][place.ulysses]
        own = share.rows if rows is None else rows[share.rows]
        parts.append(Part(layout, own, own[share.wanted] if place.tensor == 0 else None))
    return parts


def by_sequence(everything: StoresLayout, ranks: int) -> list[tuple[StoresLayout, Tensor]]:
    """A layout for each of ``ranks`` and its rows: whole sequences, so that each has about as many scores to compute.

    It may be empty, but not the first. A sequence's rows do not depend on others, so the results are those of one rank.
    The batch wants all rows, or those of the generation expert.
    """
    assert everything.wanted in (None, (0, everything.gen_rows)), "as the DiT wants them"
    return [_sequences(everything, sequences) for sequences in _shares(everything, ranks)]


def _shares(layout: StoresLayout, ranks: int) -> list[list[int]]:
    """Sequences by rank: the longest first, each to the rank with the least work."""
    work = [0] * len(layout.stores)
    for span in layout.spans:
        length = max(slot + stop - start for start, stop, slot in layout.writes[span.sequence])
        work[span.sequence] += (span.stop - span.start) * length
    shares: list[list[int]] = [[] for _ in range(ranks)]
    total = [0] * ranks
    for sequence in sorted(range(len(work)), key=lambda one: -work[one]):
        rank = total.index(min(total))
        shares[rank].append(sequence)
        total[rank] += work[sequence]
    return [sorted(share) for share in shares]


def _sequences(layout: StoresLayout, sequences: Sequence[int]) -> tuple[StoresLayout, Tensor]:
    """The part of a forward that ``sequences`` are."""
    number = {sequence: index for index, sequence in enumerate(sequences)}
    spans: list[QuerySpan] = []
    rows = [torch.empty(0, dtype=torch.int64)]
    moved: dict[int, int] = {}  # a span's first row here, by its first row in the whole batch
    end = gen_rows = 0
    for span in sorted((span for span in layout.spans if span.sequence in number), key=lambda span: span.start):
        count = span.stop - span.start
        moved[span.start] = end
        spans.append(QuerySpan(end, end + count, number[span.sequence], span.causal))
        rows.append(torch.arange(span.start, span.stop))
        end += count
        gen_rows += count if span.start < layout.gen_rows else 0
    writes = tuple(
        tuple((moved[start], moved[start] + stop - start, slot) for start, stop, slot in layout.writes[sequence])
        for sequence in sequences
    )
    wanted = None if layout.wanted is None else (0, gen_rows)
    of_sequences = tuple(layout.stores[sequence] for sequence in sequences)
    # A sequence's spans stay adjacent, as in the whole batch: its new keys and values are written once for both.
    ordered = tuple(sorted(spans, key=lambda span: (span.sequence, span.start)))
    return StoresLayout(end, gen_rows, wanted, ordered, of_sequences, writes), torch.cat(rows)
