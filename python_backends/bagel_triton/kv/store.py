"""The KV layout, and how a forward reads and writes it: a sequence at a time, or on a GPU all in one call.

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
from pathlib import Path

import torch
from torch import Tensor

from bagel_triton.model.attention import QuerySpan, SequenceKV
from bagel_triton.model.cuda.attention import KeySpan, VarlenCall, varlen_attention
from bagel_triton.protocol.messages import KVGeometry


def store_shape(geometry: KVGeometry, slots: int) -> tuple[int, int, int, int, int]:
    """``[layers, 2, slots, kv_heads, head_dim]``."""
    return (geometry.layers, 2, slots, geometry.kv_heads, geometry.head_dim)


def token_bytes(geometry: KVGeometry) -> int:
    """Bytes of one token's keys and values over all layers."""
    itemsize = getattr(torch, geometry.dtype).itemsize
    return geometry.layers * 2 * geometry.kv_heads * geometry.head_dim * int(itemsize)


def new_store(geometry: KVGeometry, slots: int, device: torch.device) -> Tensor:
    """An empty store in this process's memory, or that of a GPU."""
    return torch.zeros(store_shape(geometry, slots), dtype=getattr(torch, geometry.dtype), device=device)


def map_store(file: Path, geometry: KVGeometry) -> Tensor:
    """The whole of a store's file, mapped; raises OSError or RuntimeError."""
    size, dtype = file.stat().st_size, getattr(torch, geometry.dtype)
    flat = torch.from_file(str(file), shared=True, size=size // dtype.itemsize, dtype=dtype)
    return flat.view(store_shape(geometry, size // token_bytes(geometry)))


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
    elif out.device != store.device:
        out.copy_(store.index_select(2, slots.to(store.device)))
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
        self.spans, self.stores, self.writes = spans, stores, writes
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
        key, value = self.stores[sequence][layer]
        return key, value

    def _copy(self, layer: int, sequence: int, rows: slice) -> None:
        """Copy those of the new ``rows`` that belong to the sequence to their slots."""
        assert self._new is not None, "a step is written before it is read"
        for start, stop, slot in self.writes[sequence]:
            first, last = max(start, rows.start), min(stop, rows.stop)
            if first < last:
                for target, new in zip(self.stores[sequence][layer], self._new, strict=True):
                    target[slot + first - start : slot + last - start].copy_(new[first:last])


def _by(key: Callable[[QuerySpan], int], spans: Sequence[QuerySpan]) -> dict[int, list[QuerySpan]]:
    """Spans of equal ``key``, in their order."""
    found: dict[int, list[QuerySpan]] = {}
    for span in spans:
        found.setdefault(key(span), []).append(span)
    return found


@dataclass(frozen=True)
class PagedKeys:
    """Locations of the keys of sequences in a pool, once for all layers.

    ``blocks`` are those of all sequences, one after the other, or none where each sequence's blocks are
    consecutive: its keys are read where they are then. ``spans`` say where each span's keys start, in the pool or
    behind the gathered ones.
    """

    blocks: list[int]
    spans: list[KeySpan]

    @classmethod
    def of(
        cls, spans: Sequence[QuerySpan], sequences: Sequence[tuple[Sequence[int], int]], block_tokens: int
    ) -> PagedKeys:
        """``sequences`` are each one's blocks and tokens."""
        in_place = all(list(blocks) == list(range(blocks[0], blocks[0] + len(blocks))) for blocks, _ in sequences)
        gathered: list[int] = []
        starts = []
        for blocks, _ in sequences:
            starts.append((blocks[0] if in_place else len(gathered)) * block_tokens)
            gathered.extend(() if in_place else blocks)
        keys = [
            KeySpan(span.start, span.stop, starts[span.sequence], sequences[span.sequence][1], span.causal)
            for span in spans
        ]
        return cls(gathered, keys)


class PoolStep:
    """One forward's view of the pool: new tokens to ``write_slots`` [tokens] int64, in the batch's order.

    ``blocks`` [n] int64 are gathered by each layer, in one copy, where ``calls`` count keys from there; None reads
    the pool itself.
    """

    def __init__(
        self, store: Tensor, write_slots: Tensor, blocks: Tensor | None, calls: Sequence[VarlenCall], block_tokens: int
    ) -> None:
        self._store, self._write_slots, self._calls = store, write_slots, calls
        self._blocks, self._block_tokens = blocks, block_tokens

    def write(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Store keys and values [tokens, kv_heads, head_dim]."""
        for target, new in zip(self._store[layer], (key, value), strict=True):
            target.index_copy_(0, self._write_slots, new)

    def attend(self, layer: int, query: Tensor) -> Tensor:
        """query [tokens, heads, head_dim], same shape out."""
        keys_and_values = self._store[layer]
        if self._blocks is not None:
            by_block = keys_and_values.unflatten(1, (-1, self._block_tokens))
            keys_and_values = by_block.index_select(1, self._blocks).flatten(1, 2)
        key, value = keys_and_values
        return _joined([varlen_attention(query[call.rows], key, value, call) for call in self._calls])


@dataclass(frozen=True)
class WorkspacePart:
    """Adjacent rows: the slots that take their keys and values, [rows] int64, and which keys they see."""

    slots: Tensor
    call: VarlenCall


class WorkspaceVarlenStep:
    """One forward's view of the DiT's workspace, ``store``, where no past ever moves.

    Images of one request share the slots behind each branch's past. So the parts of a ``turn``
    are written just before they attend; every turn but one waits for that.
    """

    def __init__(self, store: Tensor, turns: Sequence[Sequence[WorkspacePart]]) -> None:
        self._store, self._turns = store, turns
        self._new: tuple[Tensor, Tensor] | None = None

    def write(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Keep keys and values [tokens, kv_heads, head_dim] until their turn."""
        self._new = key, value

    def attend(self, layer: int, query: Tensor) -> Tensor:
        """query [tokens, heads, head_dim], same shape out."""
        assert self._new is not None, "a step is written before it is read"
        key, value = self._store[layer]
        found: dict[int, Tensor] = {}
        for parts in self._turns:
            for part in parts:
                for target, new in zip((key, value), self._new, strict=True):
                    target.index_copy_(0, part.slots, new[part.call.rows])
            for part in parts:
                found[part.call.rows.start] = varlen_attention(query[part.call.rows], key, value, part.call)
        return _joined([found[start] for start in sorted(found)])


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(parts)) if len(parts) > 1 else parts[0]
