"""Threads that share one forward's work by rows and by heads.

torch parallelises within an operation: its OpenMP threads meet at the end of each one, every
hundred microseconds or less, and most operations between two matrix products are too short
to be worth that. A pool's threads meet a few times a layer instead. Each computes with one
intra-op thread and takes a tile of rows, or a head, through all operations.
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
# A product with few rows reads each weight once. From this many on that takes one core milliseconds,
# and all cores together read them faster.
MIN_INTRAOP_WEIGHTS = 1 << 23
OMP_PAUSE_SOFT = 1  # ends the threads and keeps settings such as their number
_set_num_threads_lock = threading.Lock()


class ThreadPool:
    """``size`` threads, one of which is the caller of :meth:`parallel_for`.

    A pool of two or more has one intra-op thread in each of its threads. The caller has to set
    itself up alike (:meth:`use_caller_thread`), or its waiting OpenMP threads occupy the cores.
    Work that has no rows to share runs on one further thread with all intra-op threads
    (:meth:`run_with_intraop_threads`).

    Threads: call the methods from one thread at a time.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._intraop_threads = torch.get_num_threads()
        self._tasks: queue.SimpleQueue[_ParallelFor[Any] | None] = queue.SimpleQueue()
        self._threads = [threading.Thread(target=self._run, name=f"pool-{n}", daemon=True) for n in range(1, size)]
        for thread in self._threads:
            thread.start()
        # Its thread starts at the first task.
        threads = self._intraop_threads
        self._intraop = ThreadPoolExecutor(1, "pool-intraop", _set_num_threads, (threads, threads))

    @classmethod
    def of(cls, device: torch.device) -> ThreadPool:
        """As many threads as the caller has intra-op threads on a CPU; the caller alone on a GPU."""
        return cls(torch.get_num_threads() if device.type == "cpu" else 1)

    def use_caller_thread(self) -> None:
        """From now on the calling thread computes with one intra-op thread, as the pool's own threads do."""
        if self.size > 1:
            _set_num_threads(1, self._intraop_threads)

    def parallel_for(self, task: Callable[[Item], None], items: Iterable[Item]) -> None:
        """Run ``task`` once for each item, started in order; return when all have ended.

        Raises:
            Exception: the first error of a task; items that have not started by then are skipped.
        """
        work: _ParallelFor[Item] = _ParallelFor(task, items)
        helpers = self._threads[: max(len(work) - 1, 0)]
        for _ in helpers:
            self._tasks.put(work)
        work.run()
        for _ in helpers:
            work.ended.get()
        if work.errors:
            raise work.errors[0]

    def prefers_intraop_threads(self, weights: int) -> bool:
        """Whether a product of few rows with so many weights is faster with all intra-op threads."""
        return self.size > 1 and weights >= MIN_INTRAOP_WEIGHTS

    def run_with_intraop_threads(self, task: Callable[[], Value]) -> Value:
        """Return or raise what ``task`` does, run with all intra-op threads.

        For work that has no rows to share; ``task`` must not call :meth:`parallel_for`.
        """
        if self.size == 1:
            return task()
        return self._intraop.submit(_run_and_release, task, torch.is_inference_mode_enabled()).result()

    def close(self) -> None:
        """End the threads."""
        for _ in self._threads:
            self._tasks.put(None)
        for thread in self._threads:
            thread.join()
        self._intraop.shutdown()

    def _run(self) -> None:
        _set_num_threads(1, self._intraop_threads)
        while (work := self._tasks.get()) is not None:
            with torch.inference_mode(work.inference):
                work.run()
            ended = work.ended
            del work  # and with it what the task holds, such as a forward's buffers and the KV it read
            ended.put(None)


class _ParallelFor(Generic[Item]):
    """One task and the items that it has not been started for."""

    def __init__(self, task: Callable[[Item], None], items: Iterable[Item]) -> None:
        self._task, self._items = task, deque(items)
        self.inference = torch.is_inference_mode_enabled()  # a setting of each thread
        self.ended: queue.SimpleQueue[None] = queue.SimpleQueue()
        self.errors: list[Exception] = []

    def __len__(self) -> int:
        return len(self._items)

    def run(self) -> None:
        """Work until no item is left; several threads run this at the same time."""
        while self._items:
            try:
                item = self._items.popleft()
            except IndexError:  # another thread took the last item
                return
            try:
                self._task(item)
            except Exception as error:
                self.errors.append(error)
                self._items.clear()


def _run_and_release(task: Callable[[], Value], inference: bool) -> Value:
    try:
        with torch.inference_mode(inference):
            return task()
    finally:
        release_intraop_threads()


def _set_num_threads(own: int, later: int) -> None:
    """Give the calling thread ``own`` intra-op threads, and threads that start from now on ``later``.

    torch has one process-wide default, which a thread copies at its first operation. A thread
    whose first operation runs at the same time as this function copies the wrong number, so
    engines are built before other threads compute.
    """
    with _set_num_threads_lock:
        torch.get_num_threads()  # makes this thread copy the default now, not after it is set
        torch.set_num_threads(own)
        restore = threading.Thread(target=torch.set_num_threads, args=(later,))
        restore.start()
        restore.join()


def _find_pause() -> Callable[[int], int] | None:
    try:
        pause: Callable[[int], int] = ctypes.CDLL(None).omp_pause_resource_all
    except AttributeError:  # torch was built without OpenMP 5
        return None
    return pause


_pause = _find_pause()


def release_intraop_threads() -> None:
    """End the calling thread's OpenMP threads, which would spin; its next operation starts new ones in some 50 us."""
    if _pause is not None:
        _pause(OMP_PAUSE_SOFT)


SINGLE_THREAD = ThreadPool(1)
