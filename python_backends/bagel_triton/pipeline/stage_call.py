"""One request's visit to a stage, as its orchestrator sees it."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Generator
from typing import Generic, TypeVar

from bagel_triton.protocol.errors import BagelError, Cancelled, DeadlineExceeded, StageUnavailable, from_exception
from bagel_triton.protocol.events import Event, Stage, StageStats

Result = TypeVar("Result")
POLL_S = 0.05  # how soon a client that left, or a stage that died, is noticed
LAST_WORDS_S = 0.3  # for what a process said, or another process of its stage says, when it has died


class StageCall(Generic[Result]):
    """Filled by a stage from any thread, followed by one orchestrator.

    ``alive`` tells whether the stage can still answer; it is asked while the stage is silent.
    """

    def __init__(self, stage: Stage, alive: Callable[[], bool] = lambda: True) -> None:
        self.stage, self.started_at = stage, time.time()
        self._alive = alive
        self._items: queue.SimpleQueue[Event | BagelError | tuple[Result, StageStats]] = queue.SimpleQueue()

    def progress(self, event: Event) -> None:
        """The stage is alive and this far."""
        self._items.put(event)

    def finish(self, result: Result, stats: StageStats) -> None:
        """The stage's answer."""
        self._items.put((result, stats))

    def fail(self, error: BaseException) -> None:
        """The stage will not answer."""
        self._items.put(from_exception(error))

    def follow(
        self, cancelled: Callable[[], bool], timeout_s: float, deadline: float | None = None
    ) -> Generator[Event, None, tuple[Result, StageStats]]:
        """Yield progress until the answer, which is returned.

        Raises:
            Cancelled: ``cancelled`` became true.
            DeadlineExceeded: it is later than ``deadline``, Unix seconds.
            StageUnavailable: the stage died, or no word from it for ``timeout_s`` seconds.
            BagelError: the stage failed.
        """
        heard_at = alive_at = time.monotonic()
        while True:
            if cancelled():
                raise Cancelled("the client cancelled the request")
            if deadline is not None and time.time() > deadline:
                raise DeadlineExceeded(f"the request's timeout passed while it was at {self.stage}", "timeout")
            try:
                item = self._items.get(timeout=POLL_S)
            except queue.Empty:
                now = time.monotonic()
                if self._alive():
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
