"""What a rank computes of a forward: all rows with its heads, or the sequences that it was given.

A layout is what a forward of the DiT needs beside tensors. It changes when images join, leave or change their
branches, so it travels once and the steps between carry embeddings alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec
import torch
from torch import Tensor

from bagel_triton.kv.store import WorkspaceStep
from bagel_triton.model.attention import QuerySpan
from bagel_triton.model.mot import PackedBatch


class Layout(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A :class:`PackedBatch` and its :class:`WorkspaceStep` without their tensors; ``stores`` are numbers of stores."""

    tokens: int
    gen_rows: int
    wanted: tuple[int, int] | None
    spans: tuple[QuerySpan, ...]
    stores: tuple[int, ...]
    writes: tuple[tuple[tuple[int, int, int], ...], ...]

    def batch(self, cos: Tensor, sin: Tensor) -> PackedBatch:
        """The batch, with its rotary tables."""
        return PackedBatch(self.gen_rows, cos, sin, None if self.wanted is None else slice(*self.wanted))

    def kv(self, stores: Mapping[int, Tensor]) -> WorkspaceStep:
        """Its keys and values in ``stores``, by number."""
        return WorkspaceStep(self.spans, [stores[number] for number in self.stores], self.writes)


@dataclass(frozen=True)
class Part:
    """One rank's part of a forward: its layout, and its ``rows`` of the whole batch, int64; None for all of them."""

    layout: Layout
    rows: Tensor | None = None

    @property
    def wanted_rows(self) -> Tensor:
        """The rows whose hidden states the rank returns."""
        assert self.rows is not None, "a rank that has all rows returns none"
        return self.rows if self.layout.wanted is None else self.rows[slice(*self.layout.wanted)]

    def of(self, x: Tensor) -> Tensor:
        """The rank's rows of x [tokens, ...]."""
        return x if self.rows is None else x[self.rows]


def whole(batch: PackedBatch, kv: WorkspaceStep, stores: Sequence[int]) -> Part:
    """All of a forward; ``stores`` are the numbers of each sequence's store."""
    wanted = None if batch.wanted is None else (batch.wanted.start, batch.wanted.stop)
    writes = tuple(map(tuple, kv.writes))
    return Part(Layout(batch.tokens, batch.gen_rows, wanted, tuple(kv.spans), tuple(stores), writes))


def by_sequence(batch: PackedBatch, kv: WorkspaceStep, stores: Sequence[int], ranks: int) -> list[Part]:
    """A part for each rank: whole sequences, so that each rank has about as many scores to compute.

    It may be empty, but not rank 0's. A sequence's rows do not depend on others, so the results are those of one rank.
    The batch wants all rows, or those of the generation expert.
    """
    everything = whole(batch, kv, stores).layout
    assert everything.wanted in (None, (0, batch.gen_rows)), "as the DiT wants them"
    return [_sequences(everything, sequences) for sequences in _shares(everything, ranks)]


def _shares(layout: Layout, ranks: int) -> list[list[int]]:
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


def _sequences(layout: Layout, sequences: Sequence[int]) -> Part:
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
    return Part(Layout(end, gen_rows, wanted, ordered, of_sequences, writes), torch.cat(rows))
