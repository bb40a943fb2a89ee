"""What a piece of code leaves behind in this process.

Threads and descriptors of earlier tests may end at any time, so counts say nothing: these are the new ones alone.
"""

from __future__ import annotations

import threading
from pathlib import Path


def descriptors() -> set[str]:
    """The open descriptors of this process, without the one that the listing itself has."""
    return {path.name for path in list(Path("/proc/self/fd").iterdir()) if path.is_symlink()}


class Leaks:
    """The threads and descriptors that are newer than this object."""

    def __init__(self) -> None:
        self._threads = set(threading.enumerate())
        self._descriptors = descriptors()

    def threads(self) -> set[threading.Thread]:
        return set(threading.enumerate()) - self._threads

    def found(self) -> tuple[set[threading.Thread], set[str]]:
        """New threads and descriptors; both are empty where nothing is left."""
        return self.threads(), descriptors() - self._descriptors


NO_LEAKS: tuple[set[threading.Thread], set[str]] = (set(), set())
