"""The KV layout, and how a forward reads and writes it.

Every store, the thinker's pool and the DiT's workspace alike, is
``[layers, 2, slots, kv_heads, head_dim]``: keys at index 0, values at 1, one slot a
token. A layer's keys are one contiguous run, so tokens in consecutive slots are read
without a copy.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bagel_triton.model.attention import QuerySpan, SequenceKV
from bagel_triton.protocol.messages import KVGeometry


def store_shape(geometry: KVGeometry, slots: int) -> tuple[int, int, int, int, int]:
    """``[layers, 2, slots, kv_heads, head_dim]``."""
    return (geometry.layers, 2, slots, geometry.kv_heads, geometry.head_dim)


def token_bytes(geometry: KVGeometry) -> int:
    """Bytes of one token's keys and values over all layers."""
    itemsize = getattr(torch, geometry.dtype).itemsize
    return geometry.layers * 2 * geometry.kv_heads * geometry.head_dim * int(itemsize)


def runs_of(blocks: Sequence[int], tokens: int, block_tokens: int) -> list[slice]:
    """Slots of a context's ``tokens``, in order: a slice for each run of consecutive blocks."""
    runs: list[slice] = []
    for index, block in enumerate(blocks):
        start, count = block * block_tokens, min(block_tokens, tokens - index * block_tokens)
        if runs and runs[-1].stop == start:
            runs[-1] = slice(runs[-1].start, start + count)
        elif count > 0:
            runs.append(slice(start, start + count))
    return runs


def slots_of(blocks: Sequence[int], tokens: int, block_tokens: int) -> slice | Tensor:
    """Slots of a context's ``tokens``, in order: a slice if its blocks are consecutive."""
    runs = runs_of(blocks, tokens, block_tokens)
    if len(runs) < 2:
        return runs[0] if runs else slice(0, 0)
    starts = torch.tensor(blocks, dtype=torch.int64) * block_tokens
    return (starts[:, None] + torch.arange(block_tokens)).flatten()[:tokens]


def gather(store: Tensor, slots: slice | Tensor, out: Tensor) -> None:
    """Copy the tokens at ``slots`` of a store into ``out`` [layers, 2, tokens, kv_heads, head_dim]."""
    if isinstance(slots, slice):
        out.copy_(store[:, :, slots])
    else:
        # Directly into ``out``: one pass over the bytes, without an intermediate.
        torch.index_select(store, 2, slots.to(store.device), out=out)


@dataclass(frozen=True)
class PagedStep(SequenceKV):
    """One forward's view of the pool: new tokens to ``write_slots``, each sequence read whole.

    ``write_slots`` [tokens] int64 is in the batch's order. A store that is not on the
    forward's ``device`` is staged through copies.
    """

    spans: Sequence[QuerySpan]
    store: Tensor
    write_slots: Tensor
    sequences: Sequence[slice | Tensor]
    device: torch.device

    def write_rows(self, layer: int, key: Tensor, value: Tensor, rows: slice) -> None:
        """Store ``rows`` of keys and values [tokens, kv_heads, head_dim] in their slots."""
        for target, new in zip(self.store[layer], (key, value), strict=True):
            target.index_copy_(0, self.write_slots[rows], new[rows].to(self.store.device))

    def rounds(self, spans: Sequence[QuerySpan]) -> list[list[QuerySpan]]:
        """One sequence at a time, as reading may copy it."""
        return list(_by(lambda span: span.sequence, spans).values())

    def read(self, layer: int, sequence: int) -> tuple[Tensor, Tensor]:
        """Keys and values [length, kv_heads, head_dim] of a sequence."""
        slots = self.sequences[sequence]
        both = (part[slots] if isinstance(slots, slice) else part.index_select(0, slots) for part in self.store[layer])
        key, value = (part.to(self.device) for part in both)
        return key, value


class WorkspaceStep(SequenceKV):
    """One forward's view of stores whose past never moves.

    New tokens go to the slots behind it. Sequences with the same past, such as the images of one
    request, may share a store: the new tokens of each go to the same slots then, just before that
    sequence is read. So nothing past is ever copied.

    ``writes`` has for each sequence the batch's rows and the slot where they go:
    ``(start, stop, slot)``.
    """

    def __init__(
        self,
        spans: Sequence[QuerySpan],
        stores: Sequence[Tensor],
        writes: Sequence[Sequence[tuple[int, int, int]]],
    ) -> None:
        self.spans, self._stores, self._writes = spans, stores, writes
        users = Counter[int]()
        self._turns = []  # how many earlier sequences use the same store
        for store in stores:
            self._turns.append(users[id(store)])
            users[id(store)] += 1
        self._shared = [users[id(store)] > 1 for store in stores]
        self._new: tuple[Tensor, Tensor] | None = None

    def write_rows(self, layer: int, key: Tensor, value: Tensor, rows: slice) -> None:
        """Store ``rows`` of keys and values [tokens, kv_heads, head_dim], or keep them until they are read."""
        self._new = key, value
        for sequence, shared in enumerate(self._shared):
            if not shared:
                self._copy(layer, sequence, rows)

    def rounds(self, spans: Sequence[QuerySpan]) -> list[list[QuerySpan]]:
        """One sequence of every store at a time."""
        return list(_by(lambda span: self._turns[span.sequence], spans).values())

    def read(self, layer: int, sequence: int) -> tuple[Tensor, Tensor]:
        """Keys and values [length, kv_heads, head_dim] of a sequence, valid until the next one of its store is read."""
        if self._shared[sequence]:
            self._copy(layer, sequence, slice(0, sys.maxsize))
        key, value = self._stores[sequence][layer]
        return key, value

    def _copy(self, layer: int, sequence: int, rows: slice) -> None:
        """Copy those of the new ``rows`` that belong to the sequence to their slots."""
        assert self._new is not None, "a step is written before it is read"
        for start, stop, slot in self._writes[sequence]:
            first, last = max(start, rows.start), min(stop, rows.stop)
            if first < last:
                for target, new in zip(self._stores[sequence][layer], self._new, strict=True):
                    target[slot + first - start : slot + last - start].copy_(new[first:last])


def _by(key: Callable[[QuerySpan], int], spans: Sequence[QuerySpan]) -> dict[int, list[QuerySpan]]:
    """Spans of equal ``key``, in their order."""
    found: dict[int, list[QuerySpan]] = {}
    for span in spans:
        found.setdefault(key(span), []).append(span)
    return found
