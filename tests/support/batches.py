"""Random sequences, batched for one forward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bagel_triton.model.attention import QuerySpan
from bagel_triton.model.bagel import Bagel
from bagel_triton.model.mot import PackedBatch, rotary_tables
from tests.support.naive import NaiveContext, NaiveKV


@dataclass(frozen=True)
class NewTokens:
    """Embeddings of one sequence's new tokens, [tokens, hidden] for each expert, all at one position."""

    gen: Tensor
    und: Tensor
    position: int


def sequence(bagel: Bagel, gen: int, und: int, seed: int) -> NewTokens:
    """Random tokens, ``gen`` for the generation expert and ``und`` for the other."""
    generator, hidden = torch.Generator().manual_seed(seed), bagel.config.language.hidden_size
    gen_rows, und_rows = (torch.randn(count, hidden, generator=generator) for count in (gen, und))
    return NewTokens(gen_rows, und_rows, 10 * seed)


def make_batch(
    bagel: Bagel,
    sequences: Sequence[NewTokens],
    contexts: Sequence[NaiveContext] | None = None,
    wanted_gen_only: bool = False,
) -> tuple[Tensor, PackedBatch, NaiveKV]:
    """The arguments of a forward over all ``sequences``, each behind its context."""
    gen_rows = sum(len(one.gen) for one in sequences)
    spans: list[QuerySpan] = []
    rows, gen_start, und_start = [], 0, gen_rows
    for number, one in enumerate(sequences):
        ranges = (gen_start, gen_start + len(one.gen)), (und_start, und_start + len(one.und))
        spans += [QuerySpan(start, stop, number, causal=False) for start, stop in ranges if start < stop]
        rows.append(torch.cat([torch.arange(start, stop) for start, stop in ranges]))
        gen_start, und_start = ranges[0][1], ranges[1][1]
    embeddings = torch.cat([one.gen for one in sequences] + [one.und for one in sequences])
    counts = [len(one.gen) for one in sequences] + [len(one.und) for one in sequences]
    positions = torch.tensor([one.position for one in sequences] * 2).repeat_interleave(torch.tensor(counts))
    tables = rotary_tables(positions, bagel.config.language, torch.float32)
    kv = NaiveKV(spans, rows, contexts or [NaiveContext() for _ in sequences])
    return embeddings, PackedBatch(gen_rows, *tables, slice(0, gen_rows) if wanted_gen_only else None), kv
