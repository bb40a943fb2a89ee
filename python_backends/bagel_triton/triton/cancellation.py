"""Clients of a stage that leave while it works for them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from bagel_triton.engine.loop import Job

POLL_S = 0.25


class DisconnectWatcher:
    """Has jobs dropped whose client has gone.

    Triton's own clients may call a stage, with nobody to send a cancellation on their behalf.
    One thread asks for all of them: the question goes to another process.
    """

    def __init__(self, drop: Callable[[Job[Any, Any]], None]) -> None:
        self._drop = drop
        self._watched: dict[Job[Any, Any], Callable[[], bool]] = {}
        self._lock, self._changed, self._closing = threading.Lock(), threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="departures", daemon=True)
        self._thread.start()

    def watch(self, job: Job[Any, Any], gone: Callable[[], bool]) -> None:
        """Drop ``job`` when ``gone`` becomes true, unless it is done by then."""
        with self._lock:
            self._watched[job] = gone
        self._changed.set()

    def close(self) -> None:
        """Watch no more."""
        self._closing.set()
        self._changed.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._closing.is_set():
            with self._lock:
                self._watched = {job: gone for job, gone in self._watched.items() if not job.done.done()}
                watched = list(self._watched.items())
            if not watched:
                self._changed.wait()
                self._changed.clear()
            for job, gone in watched:
                if not job.done.done() and gone():
                    self._drop(job)
                    with self._lock:
                        self._watched.pop(job, None)
            self._closing.wait(POLL_S)
