"""How a forward on a GPU reads and writes keys and values: all sequences in one call of the attention.

Both views hold what the host knows in tensors on the device, so no layer waits for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bagel_triton.model.attention import QuerySpan
from bagel_triton.model.cuda.attention import KeySpan, VarlenCall, varlen_attention


@dataclass(frozen=True)
class PagedKeys:
    """Where the keys of sequences in a pool are, once for all layers.

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
    """Adjacent rows of one image's branches: where their keys and values go in ``store``, and what they see there.

    ``slots`` [rows] int64.
    """

    store: Tensor
    slots: Tensor
    call: VarlenCall


class WorkspaceVarlenStep:
    """One forward's view of requests' workspaces, whose past never moves.

    Images of one request share a workspace, and the slots behind each branch's past. So the parts of a ``turn``
    are written just before they attend; every turn but one waits for that.
    """

    def __init__(self, turns: Sequence[Sequence[WorkspacePart]]) -> None:
        self._turns = turns
        self._new: tuple[Tensor, Tensor] | None = None

    def write(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Keep keys and values [tokens, kv_heads, head_dim] until their turn."""
        self._new = key, value

    def attend(self, layer: int, query: Tensor) -> Tensor:
        """query [tokens, heads, head_dim], same shape out."""
        assert self._new is not None, "a step is written before it is read"
        found: dict[int, Tensor] = {}
        for parts in self._turns:
            for part in parts:
                for target, new in zip(part.store[layer], self._new, strict=True):
                    target.index_copy_(0, part.slots, new[part.call.rows])
            for part in parts:
                key, value = part.store[layer]
                found[part.call.rows.start] = varlen_attention(query[part.call.rows], key, value, part.call)
        return _joined([found[start] for start in sorted(found)])


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(parts)) if len(parts) > 1 else parts[0]
