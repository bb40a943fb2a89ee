"""One request's visit to a stage, as the stage's engine sees it, and a question to that engine."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from bagel_triton.errors import BagelError, from_exception
from bagel_triton.events import Event, Stage, StageStats
from bagel_triton.messages import Schedule

Task = TypeVar("Task")
Result = TypeVar("Result")
Value = TypeVar("Value")
log = logging.getLogger(__name__)


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
    schedule: Schedule = field(default_factory=Schedule)
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
