"""One thread that owns a device and works on many jobs at once."""

from __future__ import annotations

import logging
import queue
import threading
import time
from abc import ABC, abstractmethod
from bisect import insort
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch

from bagel_triton.model.cpu.thread_pool import SINGLE_THREAD, ThreadPool, release_intraop_threads
from bagel_triton.model.device import CPU, is_lost
from bagel_triton.protocol.errors import (
    BagelError,
    Cancelled,
    DeadlineExceeded,
    Overloaded,
    StageUnavailable,
    from_exception,
)
from bagel_triton.protocol.events import Event, ProgressEvent, Stage, StageStats
from bagel_triton.protocol.messages import SchedulingParams
from bagel_triton.telemetry.metrics import ChangedGauges, Metrics, NoMetrics

KEEP_S, SIGN_OF_LIFE_S = 0.05, 1.0
log = logging.getLogger(__name__)


Task = TypeVar("Task")
Result = TypeVar("Result")
Value = TypeVar("Value")


class Call(Generic[Value]):
    """A question to an engine, answered on its thread by ``function``."""

    def __init__(self, function: Callable[[], Value]) -> None:
        self._function, self.future = function, Future[Value]()

    def run(self) -> None:
        """Resolve ``future``."""
        try:
            self.future.set_result(self._function())
        except Exception as error:
            self.future.set_exception(error)


@dataclass(eq=False)
class Job(Generic[Task, Result]):
    """One request's visit to a stage.

    ``done`` resolves, from the worker's thread, to the result and its timing; ``progress``
    is called from there too and must not block.
    """

    request_id: str
    task: Task
    progress: Callable[[Event], None]
    schedule: SchedulingParams = field(default_factory=SchedulingParams)
    done: Future[tuple[Result, StageStats]] = field(default_factory=Future)
    submitted_at: float = field(default_factory=time.monotonic)
    started_at: float | None = None

    def finish(self, result: Result, stage: Stage) -> None:
        """Resolve ``done``."""
        now = time.monotonic()
        started = self.started_at or now
        self.done.set_result((result, StageStats(stage, started - self.submitted_at, now - started)))

    def fail(self, error: BaseException) -> None:
        """Resolve ``done`` with ``error``."""
        if not isinstance(error, BagelError):
            log.error("request %s failed", self.request_id, exc_info=error)
        self.done.set_exception(from_exception(error))

    @property
    def rank(self) -> tuple[int, float]:
        """Its place among those that wait: by priority, then by age."""
        return self.schedule.priority, self.submitted_at

    @property
    def expired(self) -> bool:
        """Whether its time is up."""
        return self.schedule.deadline is not None and time.time() > self.schedule.deadline


class WaitingQueue(Generic[Task, Result]):
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


class EngineLoop(ABC, Generic[Task, Result]):
    """The loop every engine shares: take jobs in, admit what fits, step what is active.

    Subclasses own ``active`` jobs and implement :meth:`_admit`, :meth:`_step` and
    :meth:`_drop`. An exception in a step fails the jobs that took part in it, and the
    worker goes on. Jobs wait by priority, then by age, and no more than ``max_waiting``
    of them; one whose deadline passes fails wherever it is. ``pool`` belongs to this engine and is closed with it.
    """

    stage: Stage
    poll_s = 0.02  # how soon a condition without a wake-up, such as a released lease, is noticed

    def __init__(
        self,
        metrics: Metrics | None = None,
        max_waiting: int = 256,
        pool: ThreadPool = SINGLE_THREAD,
        device: torch.device = CPU,
    ) -> None:
        self.metrics, self._pool, self._device = metrics or NoMetrics(), pool, device
        self.gauge = ChangedGauges(self.metrics, f"{self.stage}_")
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._waiting: WaitingQueue[Task, Result] = WaitingQueue(max_waiting)
        self._closing, self.lost = threading.Event(), threading.Event()  # lost: its device is, for this process
        self._closed, self._closing_lock = False, threading.Lock()
        self._told_at = self._kept_at = time.monotonic()
        self._thread = threading.Thread(target=self._run, name=f"{self.stage}-engine", daemon=True)

    def start(self) -> None:
        """Start the thread; the subclass is fully built by then."""
        self._thread.start()

    def submit(
        self, task: Task, request_id: str, progress: Callable[[Event], None], schedule: SchedulingParams | None = None
    ) -> Job[Task, Result]:
        """Queue ``task``; from any thread."""
        job: Job[Task, Result] = Job(request_id, task, progress, schedule or SchedulingParams())
        try:
            self._check(task)
        except BagelError as error:
            job.fail(error)
            return job
        with self._closing_lock:
            if self._closed:
                job.fail(StageUnavailable(f"{self.stage} is shutting down"))
            elif self._waiting.reserve():
                self._inbox.put(lambda: self._waiting.add(job))
            else:
                self.metrics.count(f"{self.stage}_refused")
                job.fail(Overloaded(f"{self._waiting.taken} requests wait for {self.stage} already; try again later"))
                self._inbox.put(lambda: self._on_rejected(job))
        return job

    def call(self, function: Callable[[], Value]) -> Future[Value]:
        """What ``function`` returns or raises, run between steps on the worker's thread; from any thread."""
        call = Call(function)
        with self._closing_lock:
            if self._closed:
                call.future.set_exception(StageUnavailable(f"{self.stage} is shutting down"))
            else:
                self._inbox.put(call.run)
        return call.future

    def cancel(self, request_id: str) -> None:
        """Drop what ``request_id`` has here, waiting or active; from any thread."""
        self._inbox.put(lambda: self._cancel(request_id, self._jobs))

    def drop(self, job: Job[Task, Result]) -> None:
        """Drop ``job`` and what its request has here; from any thread."""
        self._inbox.put(lambda: self._cancel(job.request_id, [job]))

    def close(self) -> None:
        """Fail what is left with :class:`StageUnavailable` and end the thread."""
        self._closing.set()
        self._inbox.put(lambda: None)
        self._thread.join()
        self._pool.close()

    # --- the engine's part, all on the worker's thread ---

    @abstractmethod
    def _active(self) -> list[Job[Task, Result]]:
        """Jobs that the next step works on."""

    def _check(self, task: Task) -> None:
        """Raise a BagelError for a task that may not even wait; called from any thread."""

    @abstractmethod
    def _admit(self, job: Job[Task, Result]) -> bool:
        """Make ``job`` active; False if there is no room yet. An exception fails the job."""

    @abstractmethod
    def _step(self) -> None:
        """Advance the active jobs and finish those that are through."""

    @abstractmethod
    def _drop(self, job: Job[Task, Result]) -> None:
        """Free what an active job holds."""

    def _on_rejected(self, job: Job[Task, Result]) -> None:
        """Free what came with a job that will not be admitted any more."""

    def _housekeep(self) -> bool:
        """Between steps; True while something is pending that needs polling."""
        return False

    def _revoke_leases(self, request_id: str) -> None:
        """Free what a request left behind after its job was done."""

    def _run(self) -> None:
        self._pool.use_caller_thread()
        while not self._closing.is_set() and not self.lost.is_set():
            try:
                self._turn()
            except Exception as error:
                log.exception("%s: a step failed", self.stage)
                if not self._ends_with(error):
                    self._fail_active(error)
        self._shut_down()

    def _ends_with(self, error: Exception) -> bool:
        """Whether this worker ends, as ``error`` came of a device that no later step can use."""
        if not isinstance(error, BagelError) and is_lost(self._device):
            log.error("%s: %s is lost to this process", self.stage, self._device)
            self.lost.set()
        return self.lost.is_set()

    def _turn(self) -> None:
        """Take in, admit, and step; or wait, where there is nothing to step."""
        self._drain(0.0)
        polling = self._housekeep()
        self._expire()
        self._admit_waiting()
        self.gauge("active", len(self._active()))
        self.gauge("waiting", len(self._waiting))
        self._send_heartbeats()
        if self._active():
            started = time.monotonic()
            self._step()
            self.metrics.observe(f"{self.stage}_step_seconds", time.monotonic() - started)
        else:
            release_intraop_threads()
            self._drain(self.poll_s if polling or self._waiting else None)

    def _send_heartbeats(self) -> None:
        """A sign of life to those who wait: without one a busy stage looks dead."""
        now = time.monotonic()
        if now - self._kept_at > KEEP_S:
            self._kept_at = now
            for job in self._waiting:
                try:
                    self._renew_leases(job)
                except Exception as error:  # its own failure, not that of those being worked on
                    self._remove(job)
                    job.fail(error)
        if now - self._told_at > SIGN_OF_LIFE_S:
            self._told_at = now
            for job in self._waiting:
                job.progress(ProgressEvent(self.stage, 0, 0))

    def _renew_leases(self, job: Job[Task, Result]) -> None:
        """See that what a waiting job needs is still there when its turn comes; a BagelError fails it."""

    def _expire(self) -> None:
        """Fail every job whose time is up, waiting or active."""
        for job in [job for job in self._jobs if job.expired]:
            self._remove(job)
            job.fail(DeadlineExceeded(f"the request's timeout passed while it was at {self.stage}", "timeout"))
            self._revoke_leases(job.request_id)

    def _remove(self, job: Job[Task, Result]) -> None:
        """Take a job from the line, or from the active ones."""
        if job in self._waiting:
            self._waiting.remove(job)
            self._on_rejected(job)
        else:
            self._drop(job)

    def _drain(self, wait_s: float | None) -> None:
        try:
            message = self._inbox.get_nowait() if wait_s == 0.0 else self._inbox.get(timeout=wait_s)
            while True:
                message()
                message = self._inbox.get_nowait()
        except queue.Empty:
            return

    def _admit_waiting(self) -> None:
        for job in self._waiting:
            try:
                if not self._admit(job):
                    return
                job.started_at = time.monotonic()
                self.metrics.observe(f"{self.stage}_queue_seconds", job.started_at - job.submitted_at)
            except Exception as error:
                self._ends_with(error)
                self._on_rejected(job)
                job.fail(error)
            self._waiting.remove(job)

    @property
    def _jobs(self) -> list[Job[Task, Result]]:
        return [*self._waiting, *self._active()]

    def _cancel(self, request_id: str, among: Sequence[Job[Task, Result]]) -> None:
        for job in [job for job in self._jobs if job in among and job.request_id == request_id]:
            self._remove(job)
            job.fail(Cancelled(f"request {request_id} was cancelled"))
            self.metrics.count(f"{self.stage}_cancelled")
        self._revoke_leases(request_id)

    def _fail_active(self, error: Exception) -> None:
        for job in self._active():
            self._drop(job)
            job.fail(error)

    def _shut_down(self) -> None:
        with self._closing_lock:
            self._closed = True
        self._drain(0.0)
        reason = "lost its device and starts again" if self.lost.is_set() else "is shutting down"
        for job in self._jobs:
            if not self.lost.is_set():  # else to free what it holds there would fail, too
                self._remove(job)
            job.fail(StageUnavailable(f"{self.stage} {reason}"))
