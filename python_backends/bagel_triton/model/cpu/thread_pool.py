"""Threads that share one forward's work by rows and by heads.

Within an operation a CPU's threads have to meet at its end, a hundred microseconds or less
after they started, and as many do nothing in between as there are short operations. A crew
meets a few times a layer: each of its threads takes a block of rows, or a head, through all
operations by itself.
"""

from __future__ import annotations

import ctypes
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, TypeVar

import torch

Item = TypeVar("Item")
Value = TypeVar("Value")
WORTH_A_TEAM = 1 << 23  # weights of a product with few rows: a few milliseconds of one core's reading
_setting = threading.Lock()


class ThreadPool:
    """``size`` threads, whoever calls :meth:`each` one of them.

    Each of a crew of two or more computes without a team of its own, that is, without OpenMP
    threads within an operation; so must the caller, who is to :meth:`lead`, or its team takes
    the others' cores while it waits. What has no rows to share runs :meth:`together` instead,
    on one thread that has a team.
    Threads: the methods from one thread at a time.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._usual = torch.get_num_threads()  # of an operation, on threads that nobody told otherwise
        self._rounds: queue.SimpleQueue[_Round[Any] | None] = queue.SimpleQueue()
        self._threads = [threading.Thread(target=self._run, name=f"crew-{n}", daemon=True) for n in range(1, size)]
        for thread in self._threads:
            thread.start()
        # Started when it is needed; it alone has a team.
        self._team = ThreadPoolExecutor(1, "crew-team", _compute_with, (self._usual, self._usual))

    @classmethod
    def of(cls, device: torch.device) -> ThreadPool:
        """As many as the calling thread's operations use on a CPU; nobody else on a GPU."""
        return cls(torch.get_num_threads() if device.type == "cpu" else 1)

    def lead(self) -> None:
        """From here on, the calling thread's operations leave the cores to the crew's other threads."""
        if self.size > 1:
            _compute_with(1, self._usual)

    def parallel_for(self, task: Callable[[Item], None], items: Iterable[Item]) -> None:
        """``task`` of every item, begun in the order given; back when all are done.

        Raises:
            Exception: the first that a task raised; items not begun by then are left out.
        """
        work: _Round[Item] = _Round(task, items)
        helpers = self._threads[: max(len(work) - 1, 0)]
        for _ in helpers:
            self._rounds.put(work)
        work.run()
        for _ in helpers:
            work.ended.get()
        if work.errors:
            raise work.errors[0]

    def has_team_for(self, numbers: int) -> bool:
        """Whether operations that read as many numbers are worth all threads within each of them."""
        return self.size > 1 and numbers >= WORTH_A_TEAM

    def together(self, task: Callable[[], Value]) -> Value:
        """What ``task`` returns or raises, all threads within each of its operations: for what has no rows to share.

        It is not to call :meth:`each`.
        """
        if self.size == 1:
            return task()
        return self._team.submit(self._with_team, task, torch.is_inference_mode_enabled()).result()

    def _with_team(self, task: Callable[[], Value], inference: bool) -> Value:
        try:
            with torch.inference_mode(inference):
                return task()
        finally:
            release_team()

    def close(self) -> None:
        """End the threads."""
        for _ in self._threads:
            self._rounds.put(None)
        for thread in self._threads:
            thread.join()
        self._team.shutdown()

    def _run(self) -> None:
        _compute_with(1, self._usual)
        while (work := self._rounds.get()) is not None:
            with torch.inference_mode(work.inference):
                work.run()
            work.ended.put(None)


class _Round(Generic[Item]):
    """One task and the items it is still to be done for."""

    def __init__(self, task: Callable[[Item], None], items: Iterable[Item]) -> None:
        self._task, self._items = task, deque(items)
        self.inference = torch.is_inference_mode_enabled()  # which is each thread's own
        self.ended: queue.SimpleQueue[None] = queue.SimpleQueue()
        self.errors: list[Exception] = []

    def __len__(self) -> int:
        return len(self._items)

    def run(self) -> None:
        """Do what no other thread has begun."""
        while self._items:
            try:
                item = self._items.popleft()
            except IndexError:  # another thread was quicker
                return
            try:
                self._task(item)
            except Exception as error:
                self.errors.append(error)
                self._items.clear()


def _compute_with(threads: int, others: int) -> None:
    """The calling thread's operations use ``threads`` from here on, those of later threads ``others``.

    A thread whose very first operation comes while this runs takes its number for its own, as
    torch has one for all to begin with: engines are built before others compute.
    """
    with _setting:
        torch.get_num_threads()  # a thread's first operation would set the number anew
        torch.set_num_threads(threads)
        restore = threading.Thread(target=torch.set_num_threads, args=(others,))  # what a new thread begins with
        restore.start()
        restore.join()


SINGLE_THREAD = ThreadPool(1)


PAUSE_SOFT = 1  # omp_pause_soft: what was set, such as the number of threads, is kept


def _find() -> Callable[[int], int] | None:
    try:
        pause: Callable[[int], int] = ctypes.CDLL(None).omp_pause_resource_all
    except AttributeError:  # this torch computes without OpenMP 5
        return None
    return pause


_pause = _find()


def release_team() -> None:
    """End the calling thread's team, where it has one; its next operation starts another, in some 50 us."""
    if _pause is not None:
        _pause(PAUSE_SOFT)
