"""CUDA graphs: a step of a few hundred kernels as one launch.

A graph replays the same kernels on the same memory, so it belongs to a key: all that decides which kernels run. What
else varies is numbers in one tensor. The first step of a key runs as it is, and sets up the libraries; the second is
captured. All graphs of an engine share their memory, as one runs at a time. No GPU has run this yet.

For decoding the key is a number of texts and of blocks, both rounded up, and the adapter of all texts. Rows that fill
up repeat the last text, whose token is then written to its slot twice; blocks that fill up are read and not used.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar
from weakref import ref

import torch
from torch import Tensor

from bagel_triton.model.cuda.upload import Numbers, Upload
from bagel_triton.model.lora import LoraAdapter

TEXTS = (1, 2, 4, 8, 16, 24, 32, 48, 64)
MIN_BLOCKS = 64
MAX_GRAPHS = 48
# Held during a capture, of which torch allows one in a process, and while an engine waits for its whole device: CUDA
# refuses that while one of its streams is captured, in whichever thread, and the capture is lost, too.
CAPTURES = threading.Lock()
Key = TypeVar("Key", bound=Hashable)
Outputs = tuple[Tensor, ...]
log = logging.getLogger(__name__)


class Graph(NamedTuple):
    """A captured step and where it leaves its outputs."""

    graph: Any  # a torch.cuda.CUDAGraph
    outputs: Outputs


@dataclass
class _Met:
    """A key that has been met."""

    inputs: Tensor
    numbers: Numbers | None = None  # the contents of the inputs
    graph: Graph | None = None


class GraphCache(Generic[Key]):
    """Runs ``step`` of a key and its numbers, int64 on the device.

    Outputs are overwritten by the next run. ``step`` must neither wait for the device nor depend on numbers that are
    not in its inputs. If a capture fails, steps run without graphs from then on.
    """

    def __init__(self, device: torch.device, step: Callable[[Key, Tensor], Outputs]) -> None:
        self._device, self._step = device, step
        self._upload = Upload(device)
        self._met: OrderedDict[Key, _Met] = OrderedDict()  # the least recently used first
        self._works = True
        self._memory: Any = None

    def run(self, key: Key, numbers: Numbers) -> Outputs:
        """The step's outputs. The same object as the last ``numbers`` of its key is not uploaded again."""
        met = self._met.get(key)
        again = met is not None
        if met is None:
            if len(self._met) >= MAX_GRAPHS:
                torch.cuda.current_stream(self._device).synchronize()  # it may be running
                self._met.popitem(last=False)
            met = self._met[key] = _Met(torch.empty(len(numbers), dtype=torch.int64, device=self._device))
        self._met.move_to_end(key)
        if met.numbers is not numbers:
            self._upload.into(met.inputs, numbers)
            met.numbers = numbers
        if again and met.graph is None and self._works:
            try:
                met.graph = self._capture(key, met.inputs)
            except RuntimeError as error:
                self._works = False
                # The end of a capture that has failed is an error of its own; the traceback has the one before it.
                log.warning("no CUDA graphs: a step cannot be captured: %s", error, exc_info=True)
        if met.graph is None:
            return self._step(key, met.inputs)
        met.graph.graph.replay()
        return met.graph.outputs

    def _capture(self, key: Key, inputs: Tensor) -> Graph:
        if not any(met.graph for met in self._met.values()):  # a pool ends with its last graph
            self._memory = torch.cuda.graph_pool_handle()
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self._device)
        # Engines of other threads go on working.
        capture = torch.cuda.graph(graph, pool=self._memory, stream=stream, capture_error_mode="thread_local")
        with CAPTURES, capture:
            outputs = self._step(key, inputs)
        return Graph(graph, outputs)


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


DecodeKey = tuple[int, int, ref[LoraAdapter] | None]  # texts, blocks, and the adapter of all texts


class DecodeGraphs:
    """Runs ``step`` as a graph: from inputs to logits [texts, vocabulary] and the best token ids [texts]."""

    def __init__(
        self,
        device: torch.device,
        block_tokens: int,
        step: Callable[[StaticInputs, LoraAdapter | None], tuple[Tensor, Tensor]],
    ) -> None:
        self._block_tokens, self._step = block_tokens, step
        self._cache: GraphCache[DecodeKey] = GraphCache(device, self._on)

    def takes(self, texts: int) -> bool:
        """Whether there can be a graph for so many texts."""
        return texts <= TEXTS[-1]

    def run(self, inputs: DecodeInputs, adapter: LoraAdapter | None = None) -> tuple[Tensor, Tensor]:
        """Logits and best tokens, of as many texts as it takes, which all have ``adapter`` or none."""
        count = len(inputs.token_ids)
        sizes = _sizes(count, len(inputs.blocks))
        logits, best = self._cache.run((*sizes, None if adapter is None else ref(adapter)), filled(inputs, *sizes))
        return logits[:count], best[:count]

    def _on(self, key: DecodeKey, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """The step on what :func:`filled` makes."""
        texts, blocks, known = key
        token_ids, positions, slots, at, call = inputs.split((texts, texts, texts, blocks, 3 * texts + 2))
        longest = blocks * self._block_tokens
        static = StaticInputs(token_ids, positions, slots, at, call.to(torch.int32), longest)
        return self._step(static, None if known is None else known())


def _sizes(texts: int, blocks: int) -> tuple[int, int]:
    """Texts and blocks of the smallest graph for so many."""
    return next(size for size in TEXTS if size >= texts), max(MIN_BLOCKS, 1 << (blocks - 1).bit_length())


def filled(inputs: DecodeInputs, texts: int, blocks: int) -> list[int]:
    """``inputs`` as one list, filled up to a graph's sizes."""
    more = texts - len(inputs.token_ids)
    token_ids, positions, slots, lengths, first_keys = (
        [*part, *[part[-1]] * more]
        for part in (inputs.token_ids, inputs.positions, inputs.slots, inputs.lengths, inputs.first_keys)
    )
    rest = [0] * (blocks - len(inputs.blocks))
    return [*token_ids, *positions, *slots, *inputs.blocks, *rest, *range(texts + 1), *first_keys, 0, *lengths]
