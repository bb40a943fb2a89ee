"""One thread that owns a device and works on many jobs at once."""

from __future__ import annotations

import logging
import queue
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from bagel_triton.errors import BagelError, Cancelled, Internal, StageUnavailable
from bagel_triton.events import Event, ProgressEvent, Stage, StageStats

Task = TypeVar("Task")
Result = TypeVar("Result")
Value = TypeVar("Value")
Gauge = Callable[[str, float], None]
KEEP_S, SIGN_OF_LIFE_S = 0.05, 1.0
log = logging.getLogger(__name__)


@dataclass(eq=False)
class Job(Generic[Task, Result]):
    """One request's visit to a stage.

    ``done`` resolves, from the worker's thread, to the result and its timing; ``progress``
    is called from there too and must not block.
    """

    request_id: str
    task: Task
    progress: Callable[[Event], None]
    done: Future[tuple[Result, StageStats]] = field(default_factory=Future)
    submitted_at: float = field(default_factory=time.monotonic)
    started_at: float | None = None

    def finish(self, result: Result, stage: Stage) -> None:
        """Resolve ``done``."""
        now = time.monotonic()
        started = self.started_at or now
        self.done.set_result((result, StageStats(stage, started - self.submitted_at, now - started)))

    def fail(self, error: BagelError) -> None:
        """Resolve ``done`` with ``error``."""
        self.done.set_exception(error)


class Worker(ABC, Generic[Task, Result]):
    """The loop every engine shares: take jobs in, admit what fits, step what is active.

    Subclasses own ``active`` jobs and implement :meth:`_admit`, :meth:`_step` and
    :meth:`_drop`. An exception in a step fails the jobs that took part in it, and the
    worker goes on. ``gauge`` is told how many jobs are active and waiting.
    """

    stage: Stage
    poll_s = 0.02  # how soon a condition without a wake-up, such as a released lease, is noticed

    def __init__(self, gauge: Gauge | None = None) -> None:
        self._gauge, self._gauged = gauge, dict[str, float]()
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._waiting: deque[Job[Task, Result]] = deque()
        self._closing = threading.Event()
        self._closed, self._closing_lock = False, threading.Lock()
        self._told_at = self._kept_at = time.monotonic()
        self._thread = threading.Thread(target=self._run, name=f"{self.stage}-engine", daemon=True)

    def start(self) -> None:
        """Start the thread; the subclass is fully built by then."""
        self._thread.start()

    def submit(self, task: Task, request_id: str, progress: Callable[[Event], None]) -> Job[Task, Result]:
        """Queue ``task``; from any thread."""
        job: Job[Task, Result] = Job(request_id, task, progress)
        with self._closing_lock:
            if not self._closed:
                self._inbox.put(lambda: self._waiting.append(job))
                return job
        job.fail(StageUnavailable(f"{self.stage} is shutting down"))
        return job

    def call(self, function: Callable[[], Value]) -> Future[Value]:
        """What ``function`` returns or raises, run between steps on the worker's thread; from any thread."""
        future: Future[Value] = Future()

        def run() -> None:
            try:
                future.set_result(function())
            except Exception as error:
                future.set_exception(error)

        with self._closing_lock:
            if not self._closed:
                self._inbox.put(run)
                return future
        future.set_exception(StageUnavailable(f"{self.stage} is shutting down"))
        return future

    def cancel(self, request_id: str) -> None:
        """Drop what ``request_id`` has here, waiting or active; from any thread."""
        self._inbox.put(lambda: self._cancel(request_id))

    def close(self) -> None:
        """Fail what is left with :class:`StageUnavailable` and end the thread."""
        self._closing.set()
        self._inbox.put(lambda: None)
        self._thread.join()

    # --- the engine's part, all on the worker's thread ---

    @abstractmethod
    def _active(self) -> list[Job[Task, Result]]:
        """Jobs that the next step works on."""

    @abstractmethod
    def _admit(self, job: Job[Task, Result]) -> bool:
        """Make ``job`` active; False if there is no room yet. An exception fails the job."""

    @abstractmethod
    def _step(self) -> None:
        """Advance the active jobs and finish those that are through."""

    @abstractmethod
    def _drop(self, job: Job[Task, Result]) -> None:
        """Free what an active job holds."""

    def _housekeep(self) -> bool:
        """Between steps; True while something is pending that needs polling."""
        return False

    def _forget(self, request_id: str) -> None:
        """Free what a request left behind after its job was done."""

    # --- the loop ---

    def _run(self) -> None:
        while not self._closing.is_set():
            try:
                self._turn()
            except Exception as error:
                log.exception("%s: a step failed", self.stage)
                self._fail_active(error)
        self._shut_down()

    def _turn(self) -> None:
        """Take in, admit, and step; or wait, where there is nothing to step."""
        self._drain(0.0)
        polling = self._housekeep()
        self._admit_waiting()
        self.observe("active", len(self._active()))
        self.observe("waiting", len(self._waiting))
        self._tell_waiting()
        if self._active():
            self._step()
        else:
            self._drain(self.poll_s if polling or self._waiting else None)

    def _tell_waiting(self) -> None:
        """A sign of life to those who wait: without one a busy stage looks dead."""
        now = time.monotonic()
        if now - self._kept_at > KEEP_S:
            self._kept_at = now
            for job in list(self._waiting):
                try:
                    self._keep(job)
                except BagelError as error:  # its own failure, not that of those being worked on
                    self._waiting.remove(job)
                    job.fail(error)
        if now - self._told_at > SIGN_OF_LIFE_S:
            self._told_at = now
            for job in self._waiting:
                job.progress(ProgressEvent(self.stage, 0, 0))

    def _keep(self, job: Job[Task, Result]) -> None:
        """See that what a waiting job needs is still there when its turn comes; a BagelError fails it."""

    def observe(self, name: str, value: float) -> None:
        """Set the gauge ``STAGE_name`` where it changed."""
        if self._gauge is not None and self._gauged.get(name) != value:
            self._gauged[name] = value
            self._gauge(f"{self.stage}_{name}", value)

    def _drain(self, wait_s: float | None) -> None:
        try:
            message = self._inbox.get_nowait() if wait_s == 0.0 else self._inbox.get(timeout=wait_s)
            while True:
                message()
                message = self._inbox.get_nowait()
        except queue.Empty:
            return

    def _admit_waiting(self) -> None:
        while self._waiting:
            job = self._waiting[0]
            try:
                if not self._admit(job):
                    return
                job.started_at = job.started_at or time.monotonic()
            except BagelError as error:
                job.fail(error)
            except Exception as error:
                log.exception("%s: request %s could not be admitted", self.stage, job.request_id)
                job.fail(Internal(f"{type(error).__name__}: {error}"))
            self._waiting.popleft()

    def _cancel(self, request_id: str) -> None:
        error = Cancelled(f"request {request_id} was cancelled")
        for job in [job for job in self._waiting if job.request_id == request_id]:
            self._waiting.remove(job)
            job.fail(error)
        for job in [job for job in self._active() if job.request_id == request_id]:
            self._drop(job)
            job.fail(error)
        self._forget(request_id)

    def _fail_active(self, error: Exception) -> None:
        typed = error if isinstance(error, BagelError) else Internal(f"{type(error).__name__}: {error}")
        for job in self._active():
            self._drop(job)
            job.fail(typed)

    def _shut_down(self) -> None:
        with self._closing_lock:
            self._closed = True
        self._drain(0.0)
        error = StageUnavailable(f"{self.stage} is shutting down")
        self._fail_active(error)
        while self._waiting:
            self._waiting.popleft().fail(error)
