"""Processes that load weights, told what to do through a pipe."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import Tensor

from bagel_triton.weights.checkpoint import Checkpoint
from bagel_triton.weights.files import FileIdentity
from bagel_triton.weights.sharing import WeightStore
from bench.process_memory import ProcessMemory

TINY = Path(__file__).parents[1] / "data" / "tiny-a"
CPU = torch.device("cpu")
FILES = (FileIdentity("checkpoint", 1, 2),)


def sources(seed: int = 0) -> dict[str, Tensor]:
    """Stored weights; the sizes are no multiples of an alignment."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a": (33, 7), "b": (5,), "c": (1, 3, 3), "d": (129, 65), "e": ()}
    return {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}


class Watched(dict[str, Tensor]):
    """Sources that tell when the conversion has come to ``at``, and go on when told to."""

    def __init__(self, pipe: Connection, tensors: Mapping[str, Tensor], at: str) -> None:
        super().__init__(tensors)
        self._pipe, self._at = pipe, at

    def __getitem__(self, name: str) -> Tensor:
        if name == self._at:
            self._pipe.send("converting")
            self._pipe.recv()
        return super().__getitem__(name)


def convert(pipe: Connection, directory: Path, prefix: str, at: str) -> None:
    """Convert :func:`sources`, telling of the start, of reaching ``at`` and of the end; then wait."""
    pipe.send("started")
    tensors = WeightStore(prefix, directory).converted(Watched(pipe, sources(), at), torch.float32, FILES)
    pipe.send("converted")
    pipe.recv()
    del tensors


def hold(pipe: Connection, directory: Path, prefix: str, checkpoint: Path) -> None:
    """Load the transformer and read all of it; then answer ``compare``, ``measure``, ``die`` and ``end``.

    ``measure`` is answered by the memory that the weights added to the process.
    """
    for tensor in Checkpoint(TINY).load_bagel(CPU, torch.float32).state_dict().values():
        tensor.sum()  # what torch imports and starts when first used is not to be counted
    before = ProcessMemory.own()
    loaded = Checkpoint(checkpoint).load_bagel(CPU, torch.float32, WeightStore(prefix, directory)).state_dict()
    for tensor in loaded.values():
        tensor.sum()
    pipe.send("loaded")
    while True:
        match pipe.recv():
            case "compare":
                private = Checkpoint(checkpoint).load_bagel(CPU, torch.float32).state_dict()
                pipe.send([name for name in private if not torch.equal(private[name], loaded[name])])
            case "measure":
                now = ProcessMemory.own()
                pipe.send(ProcessMemory(now.pss - before.pss, now.anonymous - before.anonymous))
            case "die":
                os.kill(os.getpid(), signal.SIGKILL)
            case "end":
                return


def overwrite(directory: Path, prefix: str) -> None:
    """Write to a shared weight."""
    WeightStore(prefix, directory).converted(sources(), torch.float32, FILES)["a"].zero_()
