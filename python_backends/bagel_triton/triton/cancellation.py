"""Direct clients of a stage that disconnect while it works for them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from bagel_triton.engine.loop import Job

POLL_S = 0.25


class DisconnectWatcher:
    """Aborts the jobs of clients that cancelled their call.

    One thread checks all of them, since each check is a round trip to another process. Triton
    reports a cancelled gRPC call. It does not report a closed HTTP connection (24.10), nor a
    cancelled ensemble to a step that already runs.
    """

    def __init__(self, abort: Callable[[Job[Any, Any]], None]) -> None:
        self._abort = abort
        self._watched: dict[Job[Any, Any], Callable[[], bool]] = {}
        self._lock, self._changed, self._closing = threading.Lock(), threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="disconnects", daemon=True)
        self._thread.start()

    def watch(self, job: Job[Any, Any], cancelled: Callable[[], bool]) -> None:
        """Abort ``job`` when ``cancelled`` becomes true, unless it is done by then."""
        with self._lock:
            self._watched[job] = cancelled
        self._changed.set()

    def close(self) -> None:
        """Stop watching."""
        self._closing.set()
        self._changed.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._closing.is_set():
            with self._lock:
                self._watched = {job: cancelled for job, cancelled in self._watched.items() if not job.done.done()}
                watched = list(self._watched.items())
            if not watched:
                self._changed.wait()
                self._changed.clear()
            for job, cancelled in watched:
                if not job.done.done() and cancelled():
                    self._abort(job)
                    with self._lock:
                        self._watched.pop(job, None)
            self._closing.wait(POLL_S)
