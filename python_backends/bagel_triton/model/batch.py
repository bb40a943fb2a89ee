"""What one forward runs: the rows of many sequences, sorted by expert."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from bagel_triton.model.attention import QuerySpan


@dataclass(frozen=True)
class PackedBatch:
    """The tokens of one forward, apart from their embeddings: ``[gen rows | und rows]``.

    ``cos`` and ``sin`` are the rotary tables of the rows' positions, [tokens, 1, head_dim] each.
    The order of rows within an expert is free.

    Rows outside ``wanted`` get keys and values in every layer; their hidden states are
    undefined, so an executor may skip the rest of the last layer for them. None wants all rows.
    """

    gen_rows: int
    cos: Tensor
    sin: Tensor
    wanted: slice | None = None

    @property
    def tokens(self) -> int:
        """Rows of both experts."""
        return len(self.cos)

    def wants(self, rows: slice | QuerySpan) -> bool:
        """Whether the hidden states of some of these rows are wanted."""
        return self.wanted is None or (rows.start < self.wanted.stop and rows.stop > self.wanted.start)
