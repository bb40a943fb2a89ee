"""The jobs that wait for a stage: in order, and never too many."""

from __future__ import annotations

import threading
from bisect import insort
from collections.abc import Iterator
from typing import Generic

from bagel_triton.engine.job import Job, Result, Task


class Line(Generic[Task, Result]):
    """Jobs by priority, then by age; at most ``limit``, those on their way here counted.

    Places are reserved from any thread; everything else is the worker's.
    """

    def __init__(self, limit: int) -> None:
        self._limit, self.taken = limit, 0
        self._jobs: list[Job[Task, Result]] = []
        self._lock = threading.Lock()

    def reserve(self) -> bool:
        """Take a place for a job to come; False where all are taken."""
        with self._lock:
            free = self.taken < self._limit
            self.taken += free
            return free

    def add(self, job: Job[Task, Result]) -> None:
        """Let ``job`` take its reserved place."""
        insort(self._jobs, job, key=lambda waiting: waiting.rank)

    def remove(self, job: Job[Task, Result]) -> None:
        """Let ``job`` leave."""
        self._jobs.remove(job)
        with self._lock:
            self.taken -= 1

    def __iter__(self) -> Iterator[Job[Task, Result]]:
        """The first in line first; jobs may leave meanwhile."""
        return iter(list(self._jobs))

    def __len__(self) -> int:
        return len(self._jobs)

    def __contains__(self, job: object) -> bool:
        return job in self._jobs
