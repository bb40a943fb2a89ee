"""The rows of a denoising step: latents and vision tokens of each image in each of its contexts.

Rows, positions and slots depend on the images and their branches alone, so they are built anew only when those
change. On a CPU each context has a store of its own. On a GPU all are in one workspace, and what varies between
requests of the same sizes is numbers in one tensor, so that their steps can be one CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bagel_triton.engine.dit.run import FlowRun
from bagel_triton.kv.store import WorkspacePart, WorkspaceStep, WorkspaceVarlenStep
from bagel_triton.model.attention import QuerySpan
from bagel_triton.model.config import VISION_TOKENS
from bagel_triton.model.cuda.attention import KeySpan, call_of, grouped, numbers_of
from bagel_triton.model.lora import AdaptedRows, adapted_rows

KEYS = 512  # to a multiple of which a graph's longest context is rounded up


class BranchItem(NamedTuple):
    """An image in one of its contexts, the unit of a step's batch."""

    run: FlowRun
    image: int
    context: int


@dataclass(frozen=True)
class StepRows:
    """Rows of a step, ``[gen rows | und rows]``: those of each item, and the RoPE position of each row.

    ``parts`` has for every item its latents and its vision tokens, as (start, stop, slot): rows of the batch, and
    where their keys and values go in the item's context. Both are adjacent there.
    """

    gen_rows: int
    positions: Tensor  # [rows] int64
    parts: list[tuple[tuple[int, int, int], tuple[int, int, int]]]

    @classmethod
    def of(cls, items: Sequence[BranchItem]) -> StepRows:
        gen_rows = sum(item.run.tokens for item in items)
        parts, start = [], 0
        for number, (run, _, context) in enumerate(items):
            und, past = gen_rows + VISION_TOKENS * number, run.past[context]
            parts.append(((start, start + run.tokens, past), (und, und + VISION_TOKENS, past + run.tokens)))
            start += run.tokens
        # One position for a whole image, latents and vision tokens alike.
        repeats = torch.tensor([item.run.tokens for item in items] + [VISION_TOKENS] * len(items))
        positions = torch.tensor([run.next_positions[context] for run, _, context in items] * 2)
        return cls(gen_rows, positions.repeat_interleave(repeats), parts)

    def adapted(self, items: Sequence[BranchItem]) -> tuple[AdaptedRows, ...]:
        """The rows of ``items`` whose request has an adapter."""
        return adapted_rows(
            [
                (start, stop, item.run.adapter)
                for item, parts in zip(items, self.parts, strict=True)
                for start, stop, _ in parts
            ]
        )


def workspace_step(items: Sequence[BranchItem], rows: StepRows) -> WorkspaceStep:
    """Keys and values of a step whose contexts have stores of their own."""
    spans = [
        QuerySpan(start, stop, sequence, causal=False)
        for sequence, parts in enumerate(rows.parts)
        for start, stop, _ in parts
    ]
    return WorkspaceStep(spans, [run.stores[context] for run, _, context in items], rows.parts)


Group = tuple[tuple[int, int], ...]  # adjacent rows, (start, stop) of each span


@dataclass(frozen=True)
class StepShape:
    """Key of a step's graph: steps with equal rows, and contexts of about equal length, share one.

    Images of a request share the slots behind each context, so a ``turn`` has one image of each request, in groups
    of adjacent rows.
    """

    rows: int
    gen_rows: int
    turns: tuple[tuple[Group, ...], ...]
    longest: int


def shaped(items: Sequence[BranchItem], rows: StepRows) -> tuple[StepShape, NDArray[np.int64]]:
    """A step's shape, and its numbers: positions, then each group's slots, then what its call reads."""
    by_turn: dict[int, list[tuple[KeySpan, int]]] = {}  # a span and its first slot
    for (run, image, context), parts in zip(items, rows.parts, strict=True):
        own = run.slots[context]
        spans = [
            (KeySpan(start, stop, own.start, own.stop - own.start, causal=False), own.start + slot)
            for start, stop, slot in parts
        ]
        by_turn.setdefault(image, []).extend(spans)
    turns: list[tuple[Group, ...]] = []
    slots: list[NDArray[np.int64]] = []
    numbers: list[int] = []
    for pairs in by_turn.values():
        slot_of = {span.start: slot for span, slot in pairs}
        groups = grouped([span for span, _ in pairs])
        for group in groups:
            slots += [np.arange(span.stop - span.start) + slot_of[span.start] for span in group]
            numbers += numbers_of(group)
        turns.append(tuple(tuple((span.start, span.stop) for span in group) for group in groups))
    longest = max(span.length for pairs in by_turn.values() for span, _ in pairs)
    shape = StepShape(len(rows.positions), rows.gen_rows, tuple(turns), -(-longest // KEYS) * KEYS)
    return shape, np.concatenate([rows.positions.numpy(), *slots, np.asarray(numbers)])


def placed(shape: StepShape, inputs: Tensor, store: Tensor) -> tuple[Tensor, WorkspaceVarlenStep]:
    """Positions, and keys and values, of a step whose numbers are in a tensor, int64."""
    groups = [group for turn in shape.turns for group in turn]
    slots = sum(stop - start for group in groups for start, stop in group)
    positions, slots_of, rest = inputs.split((shape.rows, slots, len(inputs) - shape.rows - slots))
    numbers = rest.to(torch.int32)
    parts: list[WorkspacePart] = []
    for group in groups:
        size = sum(stop - start for start, stop in group)
        width = 3 * len(group) + 2
        spans = tuple(KeySpan(start, stop, 0, 0, causal=False) for start, stop in group)
        parts.append(WorkspacePart(slots_of[:size], call_of(spans, numbers[:width], shape.longest)))
        slots_of, numbers = slots_of[size:], numbers[width:]
    left = iter(parts)
    return positions, WorkspaceVarlenStep(store, [[next(left) for _ in turn] for turn in shape.turns])
