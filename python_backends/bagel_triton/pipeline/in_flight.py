"""The requests that the orchestrator follows."""

from __future__ import annotations

import threading
from types import TracebackType

from bagel_triton.protocol.errors import Overloaded
from bagel_triton.telemetry.metrics import Metrics


class InFlight:
    """At most ``limit`` at a time: each is ``with`` this, from whatever thread.

    Raises:
        Overloaded: there are as many already.
    """

    def __init__(self, limit: int, metrics: Metrics) -> None:
        self._limit, self._metrics = limit, metrics
        self._count, self._changed = 0, threading.Condition()

    def __enter__(self) -> None:
        with self._changed:
            if self._count >= self._limit:
                raise Overloaded(f"{self._limit} requests are in flight already")
            self._add(1)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._add(-1)

    def drain(self, seconds: float) -> None:
        """Wait until none is left, but no longer than ``seconds``."""
        with self._changed:
            self._changed.wait_for(lambda: not self._count, seconds)

    def _add(self, difference: int) -> None:
        self._count += difference
        self._metrics.gauge("requests_active", self._count)
        self._changed.notify_all()
