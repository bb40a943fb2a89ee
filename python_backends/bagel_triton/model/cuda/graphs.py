"""CUDA graphs of decoding: a step of a few hundred kernels as one launch.

A graph replays the same kernels on the same memory, so it has a number of texts and of blocks: both are rounded up,
and a graph is captured when a pair is met for the first time. Rows that fill up repeat the last text, whose token
is then written to its slot twice; blocks that fill up are read and not used. No GPU has run this yet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bagel_triton.model.cuda.upload import Upload

TEXTS = (1, 2, 4, 8, 16, 24, 32, 48, 64)
MIN_BLOCKS = 64
MAX_GRAPHS = 48


@dataclass(frozen=True)
class DecodeInputs:
    """A step's texts, as numbers: a token, its position, slot and context length each, and the contexts' blocks.

    ``first_keys`` say where each context starts behind the gathered blocks, in tokens.
    """

    token_ids: Sequence[int]
    positions: Sequence[int]
    slots: Sequence[int]
    lengths: Sequence[int]
    first_keys: Sequence[int]
    blocks: Sequence[int]


@dataclass(frozen=True)
class StaticInputs:
    """The same on the device, filled up, at addresses that stay: int64, and the numbers of a call as int32.

    ``max_length`` is more than any context of this graph has.
    """

    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    blocks: Tensor
    numbers: Tensor
    max_length: int


Step = Callable[[StaticInputs], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class _Graph:
    graph: torch.cuda.CUDAGraph
    inputs: Tensor
    logits: Tensor
    best: Tensor


class DecodeGraphs:
    """Runs ``step`` as a graph: from inputs to logits [texts, vocabulary] and the best token ids [texts].

    Outputs are overwritten by the next replay. ``step`` must neither wait for the device nor depend on numbers that
    are not in its inputs. If a capture fails, so does its step, and none is tried again.
    """

    def __init__(self, device: torch.device, block_tokens: int, step: Step) -> None:
        self._device, self._block_tokens, self._step = device, block_tokens, step
        self._upload = Upload(device)
        self._graphs: dict[tuple[int, int], _Graph] = {}
        self._works = True

    def takes(self, texts: int, blocks: int) -> bool:
        """Whether there is a graph for so many texts and blocks, or can be one."""
        sizes = _sizes(texts, blocks)
        return self._works and sizes is not None and (sizes in self._graphs or len(self._graphs) < MAX_GRAPHS)

    def run(self, inputs: DecodeInputs) -> tuple[Tensor, Tensor]:
        """Logits and best tokens, of inputs that it takes."""
        count = len(inputs.token_ids)
        sizes = _sizes(count, len(inputs.blocks))
        assert sizes is not None, "the caller has asked whether there is a graph"
        numbers = filled(inputs, *sizes)
        graph = self._graphs.get(sizes)
        if graph is None:
            self._works = False  # until it has turned out well
            graph = self._graphs[sizes] = self._capture(numbers, *sizes)
            self._works = True
        self._upload.into(graph.inputs, numbers)
        graph.graph.replay()
        return graph.logits[:count], graph.best[:count]

    def _capture(self, numbers: Sequence[int], texts: int, blocks: int) -> _Graph:
        inputs = torch.empty(len(numbers), dtype=torch.int64, device=self._device)
        self._upload.into(inputs, numbers)
        self._on(inputs, texts, blocks)  # libraries set themselves up outside the capture
        torch.cuda.current_stream(self._device).synchronize()
        graph = torch.cuda.CUDAGraph()
        # Engines of other threads go on working.
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream(self._device), capture_error_mode="thread_local"):
            logits, best = self._on(inputs, texts, blocks)
        return _Graph(graph, inputs, logits, best)

    def _on(self, inputs: Tensor, texts: int, blocks: int) -> tuple[Tensor, Tensor]:
        """The step on what :func:`filled` makes."""
        token_ids, positions, slots, at, call = inputs.split((texts, texts, texts, blocks, 3 * texts + 2))
        longest = blocks * self._block_tokens
        return self._step(StaticInputs(token_ids, positions, slots, at, call.to(torch.int32), longest))


def _sizes(texts: int, blocks: int) -> tuple[int, int] | None:
    """Texts and blocks of the smallest graph for so many; None where they are too many."""
    rows = next((size for size in TEXTS if size >= texts), None)
    return None if rows is None else (rows, max(MIN_BLOCKS, 1 << (blocks - 1).bit_length()))


def filled(inputs: DecodeInputs, texts: int, blocks: int) -> list[int]:
    """``inputs`` as one list, filled up to a graph's sizes."""
    more = texts - len(inputs.token_ids)
    token_ids, positions, slots, lengths, first_keys = (
        [*part, *[part[-1]] * more]
        for part in (inputs.token_ids, inputs.positions, inputs.slots, inputs.lengths, inputs.first_keys)
    )
    rest = [0] * (blocks - len(inputs.blocks))
    return [*token_ids, *positions, *slots, *inputs.blocks, *rest, *range(texts + 1), *first_keys, 0, *lengths]
