"""Waiting for what another thread or process is about to do."""

from __future__ import annotations

import time
from collections.abc import Callable

SOON_S = 10.0


def soon(condition: Callable[[], bool], seconds: float = SOON_S) -> bool:
    """Whether ``condition`` comes to hold within ``seconds``."""
    deadline = time.monotonic() + seconds
    while not (held := condition()) and time.monotonic() < deadline:
        time.sleep(0.005)
    return held
