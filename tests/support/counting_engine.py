"""An engine whose jobs count: each needs a number of steps, and may be told to break."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch

from bagel_triton.engine.loop import EngineLoop, Job
from bagel_triton.model.device import CPU
from bagel_triton.protocol.errors import BagelError
from bagel_triton.protocol.events import ProgressEvent


@dataclass(frozen=True)
class Count:
    """``steps`` to count to; ``fails_at`` breaks the step of that number, ``admission`` the admission."""

    steps: int
    fails_at: int | None = None
    admission: Exception | None = None


CountJob = Job[Count, int]
WAIT_S = 10.0


class CountingEngine(EngineLoop[Count, int]):
    """Counts ``capacity`` jobs at a time; each step waits for :attr:`pace`."""

    stage = "dit"

    def __init__(self, capacity: int = 8, max_waiting: int = 256, device: torch.device = CPU) -> None:
        super().__init__(max_waiting=max_waiting, device=device)
        self.pace = threading.Semaphore(0)
        self._unpaced = threading.Event()
        self.batches: list[list[str]] = []
        self.freed: list[str] = []
        self.revoked: list[str] = []
        self._capacity = capacity
        self._counts: dict[CountJob, int] = {}
        self.start()

    def free_run(self) -> None:
        """Do not wait any more."""
        self._unpaced.set()
        self.pace.release()

    def _active(self) -> list[CountJob]:
        return list(self._counts)

    def _admit(self, job: CountJob) -> bool:
        if job.task.admission:
            raise job.task.admission
        if len(self._counts) >= self._capacity:
            return False
        self._counts[job] = 0
        return True

    def _step(self) -> None:
        if not self._unpaced.is_set():
            self.pace.acquire()
        self.batches.append([job.request_id for job in self._counts])
        for job, count in list(self._counts.items()):
            if count + 1 == job.task.fails_at:
                raise RuntimeError("a number is missing")
            self._counts[job] = count + 1
            job.progress(ProgressEvent("dit", count + 1, job.task.steps))
            if count + 1 == job.task.steps:
                del self._counts[job]
                job.finish(count + 1, self.stage)

    def _free(self, job: CountJob) -> None:
        del self._counts[job]
        self.freed.append(job.request_id)

    def _revoke_leases(self, request_id: str) -> None:
        self.revoked.append(request_id)


def submit(engine: CountingEngine, request_id: str, count: Count) -> CountJob:
    """A job for ``engine`` whose progress is ignored."""
    return engine.submit(count, request_id, lambda event: None)


def error_of(job: CountJob) -> BagelError:
    """How ``job`` failed."""
    error = job.done.exception(WAIT_S)
    assert isinstance(error, BagelError)
    return error
