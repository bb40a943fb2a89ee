"""Data parallelism over single-threaded processes.

Two threads of one process meet after every operation, and on a shared machine one then waits for
the other most of the time: a convolution ran at 24 GFLOPS on two threads where one alone had 57.
Processes meet once a step.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable, Sequence
from multiprocessing.synchronize import Barrier
from typing import Any

import torch
from torch import Tensor, nn

TIMEOUT_S = 600.0


class Ranks:
    """The processes of a run; ``rank`` is this one's number."""

    def __init__(self, rank: int, buffers: Tensor, barrier: Barrier) -> None:
        self.rank, self.count = rank, buffers.shape[1]
        self._buffers, self._barrier = buffers, barrier
        self._turn = 0

    def average(self, parameters: Iterable[nn.Parameter], values: Sequence[float]) -> list[float]:
        """Average the parameters' gradients over all ranks, and return the averages of ``values``."""
        # With two buffers in turn one barrier is enough: none writes to a buffer that another still reads.
        buffer = self._buffers[self._turn]  # [ranks, numbers]
        self._turn = 1 - self._turn
        gradients = [p.grad for p in parameters if p.grad is not None]
        sizes = [gradient.numel() for gradient in gradients]
        total = sum(sizes)
        torch.cat([gradient.flatten() for gradient in gradients], out=buffer[self.rank, :total])
        buffer[self.rank, total : total + len(values)] = torch.tensor(values)
        parent = multiprocessing.parent_process()
        if parent is not None and not parent.is_alive():
            raise SystemExit("the training's first process has ended")
        self._barrier.wait(TIMEOUT_S)
        mean = buffer[:, : total + len(values)].mean(0)
        for gradient, part in zip(gradients, mean[:total].split(sizes), strict=True):
            gradient.copy_(part.view_as(gradient))
        return mean[total:].tolist()


def _begin(rank: int, buffers: Tensor, barrier: Barrier, work: Callable[..., None], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    work(Ranks(rank, buffers, barrier), *args)


def run(ranks: int, numbers: int, work: Callable[..., None], *args: Any) -> None:
    """Call ``work(Ranks, *args)`` in so many processes, which exchange at most ``numbers`` floats a step.

    Raises:
        RuntimeError: one of them failed.
    """
    context = multiprocessing.get_context("spawn")
    buffers, barrier = torch.zeros(2, ranks, numbers).share_memory_(), context.Barrier(ranks)
    started = [context.Process(target=_begin, args=(rank, buffers, barrier, work, args)) for rank in range(ranks)]
    for process in started:
        process.start()
    try:
        for process in started:
            process.join()
    finally:
        for process in started:
            process.terminate()
    if codes := [process.exitcode for process in started if process.exitcode]:
        raise RuntimeError(f"a training process ended with status {codes[0]}")
