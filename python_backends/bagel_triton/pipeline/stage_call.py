"""One request's call of a stage, as the orchestrator sees it."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Generator
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

from bagel_triton.protocol.errors import BagelError, Cancelled, DeadlineExceeded, StageUnavailable, from_exception
from bagel_triton.protocol.events import Stage, StageStats
from bagel_triton.protocol.intervals import REQUEST_S

LAST_WORDS_S = 0.3  # answers of a dead process, or of another process of its stage, may still arrive
Result = TypeVar("Result")


class StageCall(Generic[Result]):
    """A queue that the stage fills from any thread and one orchestrator follows.

    ``alive`` tells whether the stage can still answer. It is checked while the stage is silent.
    ``given_up`` becomes true when the orchestrator no longer waits for the answer.
    """

    def __init__(self, stage: Stage, alive: Callable[[], bool] = lambda: True) -> None:
        self.stage, self.started_at = stage, time.time()
        self.alive, self.given_up = alive, False
        self._items: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.done: Future[tuple[Result, StageStats]] = Future()

    def progress(self, event: Any) -> None:
        """Report an event of the stage; any event also shows that the stage is alive."""
        self._items.put(event)

    def finish(self, result: Result, stats: StageStats) -> None:
        """End the call with the stage's answer."""
        self._items.put((result, stats))
        if not self.done.done():
            self.done.set_result((result, stats))

    def fail(self, error: BaseException) -> None:
        """End the call with an error."""
        self._items.put(from_exception(error))
        if not self.done.done():
            self.done.set_exception(from_exception(error))

    def follow(
        self, cancelled: Callable[[], bool], timeout_s: float, deadline: float | None = None
    ) -> Generator[Any, None, tuple[Result, StageStats]]:
        """Yield events until the answer, and return it.

        Raises:
            Cancelled: ``cancelled`` became true.
            DeadlineExceeded: it is later than ``deadline``, Unix seconds.
            StageUnavailable: the stage died, or was silent for ``timeout_s`` seconds.
            BagelError: the stage failed.
        """
        try:
            return (yield from self._follow(cancelled, timeout_s, deadline))
        finally:
            self.given_up = True

    def _follow(
        self, cancelled: Callable[[], bool], timeout_s: float, deadline: float | None
    ) -> Generator[Any, None, tuple[Result, StageStats]]:
        heard_at = alive_at = time.monotonic()
        while True:
            if cancelled():
                raise Cancelled("the client cancelled the request")
            if deadline is not None and time.time() > deadline:
                raise DeadlineExceeded(f"the request's timeout passed while it was at {self.stage}", "timeout")
            try:
                item = self._items.get(timeout=REQUEST_S)
            except queue.Empty:
                now = time.monotonic()
                if self.alive():
                    alive_at = now
                elif now - alive_at > LAST_WORDS_S:
                    raise StageUnavailable(f"{self.stage} died") from None
                if now - heard_at > timeout_s:
                    raise StageUnavailable(f"{self.stage} was silent for {timeout_s:g} s") from None
                continue
            heard_at = alive_at = time.monotonic()
            if isinstance(item, BagelError):
                raise item
            if isinstance(item, tuple):
                return item
            yield item
