"""Sequence parallelism of the plain transformer (Ulysses, arXiv 2309.14509): rows over ranks, heads in the attention.

A rank computes some of a forward's rows with whole weights. Around each attention the ranks exchange: a rank gets
all rows of some heads, attends over its heads of the stores, and gives each rank its rows back. To the transformer
that is keys and values like any other.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from bagel_triton.model.attention import StepKV


class UlyssesKV:
    """A :class:`StepKV` of a rank's rows over ``kv``, which has all rows and this rank's heads.

    Args:
        kv: the layout's keys and values.
        rows: by rank of ``group``, its rows of the layout, int64.
        heads: by rank, its query heads among those that this rank computes of a row.
        kv_heads: likewise of keys and values; ranks may have the same ones.
    """

    def __init__(
        self,
        kv: StepKV,
        rows: Sequence[Tensor],
        heads: Sequence[slice],
        kv_heads: Sequence[slice],
        group: dist.ProcessGroup,
    ) -> None:
        self._kv, self._heads, self._kv_heads, self._group = kv, heads, kv_heads, group
        self._rank, self._counts = dist.get_rank(group), [len(own) for own in rows]
        self._by_rank = torch.cat([*rows])  # the layout's rows in the order in which they come
        self._order = self._by_rank.argsort()

    def write(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Store keys and values of all ranks' rows; [rows, kv_heads, head_dim] each are this rank's."""
        both = self._to_heads([torch.cat((key[:, own], value[:, own]), dim=1) for own in self._kv_heads])
        self._kv.write(layer, *both.chunk(2, dim=1))

    def attend(self, layer: int, query: Tensor) -> Tensor:
        """Attention of this rank's rows, [rows, heads, head_dim], same shape out."""
        found = self._kv.attend(layer, self._to_heads([query[:, own] for own in self._heads]))
        parts = found[self._by_rank].split(self._counts)
        out = [query[:, own] for own in self._heads]
        return torch.cat(self._exchange(parts, [part.shape for part in out]), dim=1)

    def _to_heads(self, parts: Sequence[Tensor]) -> Tensor:
        """All rows in the layout's order, with this rank's heads; ``parts`` are this rank's rows by head."""
        _, heads, size = parts[self._rank].shape
        found = self._exchange(parts, [(count, heads, size) for count in self._counts])
        return torch.cat(found)[self._order]

    def _exchange(self, parts: Sequence[Tensor], shapes: Sequence[Sequence[int]]) -> list[Tensor]:
        """Give each rank its part and get those of ``shapes``."""
        given = torch.cat([part.reshape(-1) for part in parts]).view(torch.uint8)
        dtype = parts[0].dtype
        sizes = [part.numel() * dtype.itemsize for part in parts]
        wanted = [torch.Size(shape).numel() * dtype.itemsize for shape in shapes]
        taken = given.new_empty(sum(wanted))
        dist.all_to_all_single(taken, given, wanted, sizes, group=self._group)
        return [part.view(dtype).view(shape) for part, shape in zip(taken.split(wanted), shapes, strict=True)]
