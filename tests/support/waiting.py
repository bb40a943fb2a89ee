"""Waiting for another thread or process."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
SOON_S = 10.0


def soon(condition: Callable[[], bool], seconds: float = SOON_S) -> bool:
    """Whether ``condition`` comes to hold within ``seconds``."""
    deadline = time.monotonic() + seconds
    while not (held := condition()) and time.monotonic() < deadline:
        time.sleep(0.005)
    return held


def on_a_thread(work: Callable[[], T]) -> T:
    """The result of ``work``, run on a separate thread."""
    found: list[T] = []
    thread = threading.Thread(target=lambda: found.append(work()))
    thread.start()
    thread.join()
    return found[0]
