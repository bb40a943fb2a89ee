"""The loop every engine shares: one thread that owns a device and works on many jobs at once."""

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
from typing import Any, Generic, TypeVar

import torch

from bagel_triton.model.cpu.thread_pool import SINGLE_THREAD, ThreadPool, release_intraop_threads
from bagel_triton.model.device import CPU, is_lost, own_stream
from bagel_triton.protocol.errors import (
    BagelError,
    Cancelled,
    DeadlineExceeded,
    Overloaded,
    StageUnavailable,
    from_exception,
)
from bagel_triton.protocol.events import ProgressEvent, Stage, StageStats
from bagel_triton.protocol.intervals import ENGINE_S, HEARTBEAT_S, LEASE_RENEWAL_S
from bagel_triton.protocol.messages import SchedulingParams
from bagel_triton.telemetry.metrics import ChangedGauges, Metrics, NoMetrics

log = logging.getLogger(__name__)

Task = TypeVar("Task")
Result = TypeVar("Result")
Value = TypeVar("Value")


class Call(Generic[Value]):
    """A function to run on an engine's thread; ``future`` resolves to its result."""

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
    """One request's work at a stage.

    ``done`` resolves, on the engine's thread, to the result and its timing. ``progress`` is
    called on that thread too and must not block.
    """

    request_id: str
    task: Task
    progress: Callable[[Any], None]
    scheduling: SchedulingParams = field(default_factory=SchedulingParams)
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
    def rank(self) -> tuple[bool, int, float]:
        """Order among waiting jobs: previews last, then by priority, then by age."""
        return self.scheduling.preview, self.scheduling.priority, self.submitted_at

    @property
    def expired(self) -> bool:
        """Whether the deadline has passed."""
        return self.scheduling.deadline is not None and time.time() > self.scheduling.deadline


class WaitingQueue(Generic[Task, Result]):
    """Jobs by rank; at most ``limit``, counting those still in the inbox.

    Any thread may reserve a place; everything else belongs to the engine's thread.
    """

    def __init__(self, limit: int) -> None:
        self._limit, self.taken = limit, 0
        self._jobs: list[Job[Task, Result]] = []
        self._lock = threading.Lock()

    def reserve(self) -> bool:
        """Take a place for a job that is about to be added; False if all are taken."""
        with self._lock:
            free = self.taken < self._limit
            self.taken += free
            return free

    def add(self, job: Job[Task, Result]) -> None:
        """Put ``job`` in its reserved place."""
        insort(self._jobs, job, key=lambda waiting: waiting.rank)

    def remove(self, job: Job[Task, Result]) -> None:
        """Take ``job`` out."""
        self._jobs.remove(job)
        with self._lock:
            self.taken -= 1

    def __iter__(self) -> Iterator[Job[Task, Result]]:
        """The first in line first; jobs may be removed during the iteration."""
        return iter(list(self._jobs))

    def __len__(self) -> int:
        return len(self._jobs)

    def __contains__(self, job: object) -> bool:
        return job in self._jobs


class EngineLoop(ABC, Generic[Task, Result]):
    """Takes jobs in, admits those that fit, and steps the active ones together.

    Subclasses hold the active jobs and implement :meth:`_active`, :meth:`_admit`,
    :meth:`_step` and :meth:`_free`. An exception in a step fails the jobs of that step, and
    the loop goes on. At most ``max_waiting`` jobs wait; a job whose deadline passes fails,
    waiting or active. ``pool`` belongs to this engine and is closed with it.
    """

    stage: Stage
    poll_s = ENGINE_S
    first_on_device = False  # on a GPU, whether its work goes before that of the process's other engines

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
        self._closing = threading.Event()
        self.lost = threading.Event()  # set when this process can no longer use its device
        self._closed, self._closing_lock = False, threading.Lock()
        self._heartbeat_at = self._renewed_at = time.monotonic()
        self._thread = threading.Thread(target=self._run, name=f"{self.stage}-engine", daemon=True)

    # --- from any thread ---

    def start(self) -> None:
        """Start the thread; call it when the subclass is fully built."""
        self._thread.start()

    def submit(
        self,
        task: Task,
        request_id: str,
        progress: Callable[[Any], None],
        scheduling: SchedulingParams | None = None,
    ) -> Job[Task, Result]:
        """Queue ``task``; the job fails at once if the queue is full or the engine closed."""
        job: Job[Task, Result] = Job(request_id, task, progress, scheduling or SchedulingParams())
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
        """Run ``function`` on the engine's thread between two steps; its result or exception."""
        call = Call(function)
        with self._closing_lock:
            if self._closed:
                call.future.set_exception(StageUnavailable(f"{self.stage} is shutting down"))
            else:
                self._inbox.put(call.run)
        return call.future

    def idle(self) -> Future[bool]:
        """Whether there is no job, waiting or active, among those submitted before this call."""
        return self.call(lambda: not self._jobs)

    @property
    def is_lost(self) -> bool:
        """Whether this process can no longer use the engine's device."""
        return self.lost.is_set()

    def abort(self, request_id: str) -> None:
        """Abort every job of ``request_id``, waiting or active, and revoke its leases."""
        self._inbox.put(lambda: self._abort_request(request_id, self._jobs))

    def abort_job(self, job: Job[Task, Result]) -> None:
        """Abort ``job``, if it has not ended, and revoke its request's leases."""
        self._inbox.put(lambda: self._abort_request(job.request_id, [job]))

    def end(self) -> None:
        """Fail all jobs, as this process can no longer compute; ``lost`` is set."""
        self.lost.set()
        self._inbox.put(lambda: None)

    def close(self) -> None:
        """Fail all remaining jobs with :class:`StageUnavailable` and end the thread."""
        self._closing.set()
        self._inbox.put(lambda: None)
        self._thread.join()
        self._pool.close()

    # --- for subclasses to implement; called on the engine's thread, except _check ---

    @abstractmethod
    def _active(self) -> list[Job[Task, Result]]:
        """Jobs that the next step works on."""

    def _check(self, task: Task) -> None:
        """Raise a BagelError for a task that must not even wait; called from any thread."""

    @abstractmethod
    def _admit(self, job: Job[Task, Result]) -> bool:
        """Make ``job`` active; False if it does not fit yet. An exception fails the job."""

    @abstractmethod
    def _step(self) -> None:
        """Advance the active jobs and finish those that are complete."""

    @abstractmethod
    def _free(self, job: Job[Task, Result]) -> None:
        """Free what an active job holds; it is active no more."""

    def _on_rejected(self, job: Job[Task, Result]) -> None:
        """Release what came with a job that will not be admitted."""

    def _renew_leases(self, job: Job[Task, Result]) -> None:
        """Keep a waiting job's leases from expiring; an exception fails the job."""

    def _revoke_leases(self, request_id: str) -> None:
        """Take back the leases a request left behind after its job was done."""

    def _housekeep(self) -> bool:
        """Run between steps; True while something is pending that needs polling."""
        return False

    # --- the loop ---

    def _run(self) -> None:
        self._pool.use_caller_thread()
        try:
            with own_stream(self._device, self.first_on_device):
                self._turn_until_closed()
                self._shut_down()
        except Exception:  # a device that gives no stream, or fails while memory is freed
            log.exception("%s: %s is lost to this process", self.stage, self._device)
            self.lost.set()
            self._shut_down()

    def _turn_until_closed(self) -> None:
        while not self._closing.is_set() and not self.lost.is_set():
            try:
                self._turn()
            except Exception as error:
                log.exception("%s: a step failed", self.stage)
                if not self._device_lost(error):
                    for job in self._active():
                        self._fail(job, error)

    def _device_lost(self, error: Exception) -> bool:
        """Whether ``error`` came from a device that no later step can use, which ends this engine."""
        if not isinstance(error, BagelError) and is_lost(self._device):
            log.error("%s: %s is lost to this process", self.stage, self._device)
            self.lost.set()
        return self.lost.is_set()

    def _turn(self) -> None:
        """Take in, admit, and step; or wait if there is nothing to step."""
        self._drain(0.0)
        polling = self._housekeep()
        self._fail_expired()
        self._admit_waiting()
        self.gauge("active", len(self._active()))
        self.gauge("waiting", len(self._waiting))
        self._serve_waiting()
        if self._active():
            started = time.monotonic()
            self._step()
            self.metrics.observe(f"{self.stage}_step_seconds", time.monotonic() - started)
        else:
            release_intraop_threads()
            self._drain(self.poll_s if polling or self._waiting else None)

    def _drain(self, wait_s: float | None) -> None:
        """Run the calls in the inbox; wait up to ``wait_s`` seconds (None: forever) for something."""
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
                self._device_lost(error)
                self._on_rejected(job)
                job.fail(error)
            self._waiting.remove(job)

    def _serve_waiting(self) -> None:
        """Renew the leases of waiting jobs and send their heartbeats, each when due."""
        now = time.monotonic()
        if now - self._renewed_at > LEASE_RENEWAL_S:
            self._renewed_at = now
            for job in self._waiting:
                try:
                    self._renew_leases(job)
                except Exception as error:  # this job's failure, not that of the active ones
                    self._fail(job, error)
        if now - self._heartbeat_at > HEARTBEAT_S:
            self._heartbeat_at = now
            self._send_heartbeats()

    def _send_heartbeats(self) -> None:
        """Show waiting requests that the stage is alive: silence would look like a dead one."""
        for job in self._waiting:
            job.progress(ProgressEvent(self.stage, 0, 0))

    # --- the end of a job: every path but success ---

    @property
    def _jobs(self) -> list[Job[Task, Result]]:
        return [*self._waiting, *self._active()]

    def _fail(self, job: Job[Task, Result], error: Exception) -> None:
        """Take ``job`` out of the queue or the active ones, free what it holds, and fail it."""
        if job in self._waiting:
            self._waiting.remove(job)
            self._on_rejected(job)
        else:
            self._free(job)
        job.fail(error)

    def _abort_request(self, request_id: str, among: Sequence[Job[Task, Result]]) -> None:
        for job in [job for job in self._jobs if job in among and job.request_id == request_id]:
            self._fail(job, Cancelled(f"request {request_id} was cancelled"))
            self.metrics.count(f"{self.stage}_cancelled")
        self._revoke_leases(request_id)

    def _fail_expired(self) -> None:
        for job in [job for job in self._jobs if job.expired]:
            self._fail(job, DeadlineExceeded(f"the request's timeout passed while it was at {self.stage}", "timeout"))
            self._revoke_leases(job.request_id)

    def _shut_down(self) -> None:
        with self._closing_lock:
            self._closed = True
        self._drain(0.0)
        if self.lost.is_set():  # freeing memory of a lost device would fail, too
            for job in self._jobs:
                job.fail(StageUnavailable(f"{self.stage} lost its device, or one of its ranks, and starts again"))
        else:
            for job in self._jobs:
                self._fail(job, StageUnavailable(f"{self.stage} is shutting down"))
