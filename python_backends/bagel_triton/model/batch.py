"""What one forward runs: tokens of many sequences, sorted by expert, cut into blocks of rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from bagel_triton.model.attention import QuerySpan, StepKV
from bagel_triton.model.cpu.thread_pool import SINGLE_THREAD, ThreadPool

UND, GEN = "", "_moe_gen"  # suffixes of the experts' names
BLOCK_ROWS = 576  # of a block on a CPU at most: an MLP's inner rows are a few MB then
WORTH_SHARING = 64  # rows of a block that are worth a thread of a pool
Block = tuple[str, slice]  # an expert's suffix, and rows of that expert


@dataclass(frozen=True)
class PackedBatch:
    """One forward's tokens, apart from their embeddings: [gen rows | und rows].

    ``cos`` and ``sin`` are the rotary tables of the rows' positions, [tokens, 1, head_dim].
    Of other rows than ``wanted``, all if None, the last layer computes only keys and values, and what comes
    out means nothing. ``pool`` shares the work.
    """

    gen_rows: int
    cos: Tensor
    sin: Tensor
    spans: Sequence[QuerySpan]
    kv: StepKV
    pool: ThreadPool = SINGLE_THREAD
    wanted: slice | None = None

    @property
    def keeps_pool_busy(self) -> bool:
        """Whether there are rows for everyone."""
        return len(self.cos) >= self.pool.size * WORTH_SHARING

    def leads_on(self, rows: slice | QuerySpan) -> bool:
        """Whether the last layer has to finish some of these rows."""
        return self.wanted is None or (rows.start < self.wanted.stop and rows.stop > self.wanted.start)

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """Every row once, in slices of one expert each, in the order in which a pool begins them."""
        return tuple(self._cut(UND, self.gen_rows, len(self.cos))) + tuple(self._cut(GEN, 0, self.gen_rows))

    def _cut(self, expert: str, start: int, stop: int) -> Iterator[Block]:
        on_cpu = self.cos.device.type == "cpu"
        step = block_rows(stop - start, self.pool.size) if on_cpu else max(stop - start, 1)
        for first in range(start, stop, step):
            yield expert, slice(first, min(first + step, stop))


def block_rows(rows: int, pool: int) -> int:
    """Rows of a block on a CPU: few enough for the cache, and as many blocks for each of a pool if there are enough."""
    if pool == 1:
        return BLOCK_ROWS
    # Whoever took the other expert's few rows first gets the last block, which is shorter by their cost.
    rows += WORTH_SHARING
    rounds = -(-rows // (BLOCK_ROWS * pool))
    return -(-rows // min(rounds * pool, max(rows // WORTH_SHARING, 1)))
