"""Whether a server sleeps or drains, as all of its processes see it.

Three files in shared memory. ``PREFIX_asleep`` is there from the moment a sleep begins until the server is awake again,
and has its level. ``PREFIX_draining`` is there while the server takes no new requests. ``PREFIX_awake`` carries a
shared lock of each orchestrator with requests in flight, so a sleep begins once its exclusive lock can be taken. The
kernel drops the lock of a process that dies.
"""

from __future__ import annotations

import fcntl
import os
import threading
from pathlib import Path

from bagel_triton.ipc.shm import SHM_DIRECTORY


class SleepGate:
    """The gate of the server with ``prefix``; every method is safe from any thread."""

    def __init__(self, prefix: str, directory: Path = SHM_DIRECTORY) -> None:
        self._marker, self._path = directory / f"{prefix}_asleep", directory / f"{prefix}_awake"
        self._draining = directory / f"{prefix}_draining"
        self._lock, self._count, self._held = threading.Lock(), 0, -1

    @property
    def level(self) -> int:
        """The level of the sleep, while it begins and ends too; 0 when the server is awake."""
        try:
            return int(self._marker.read_text())
        except FileNotFoundError:
            return 0

    @property
    def draining(self) -> bool:
        """Whether new requests are refused."""
        return self._draining.exists()

    def drain(self, on: bool) -> None:
        """Refuse new requests, or take them again."""
        if on:
            self._draining.touch()
        else:
            self._draining.unlink(missing_ok=True)

    def enter(self) -> bool:
        """Count a request in, until :meth:`leave`; False while the server sleeps."""
        with self._lock:
            if self._count == 0 and not self._take():
                return False
            self._count += 1
        # Looked at with the lock held: a sleep that begins now waits for this request.
        if self.level:
            self.leave()
            return False
        return True

    def leave(self) -> None:
        """Count a request out."""
        with self._lock:
            self._count -= 1
            if self._count == 0:
                os.close(self._held)

    def close(self, level: int) -> None:
        """Let no request in from now on."""
        unfinished = self._marker.with_name(f"{self._marker.name}.new")
        unfinished.write_text(str(level))
        unfinished.rename(self._marker)

    def open(self) -> None:
        """Let requests in."""
        self._marker.unlink(missing_ok=True)

    @property
    def idle(self) -> bool:
        """Whether no orchestrator has a request in flight."""
        descriptor = os.open(self._path, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        finally:
            os.close(descriptor)
        return True

    def _take(self) -> bool:
        """Take the shared lock; False where a sleep that begins holds the other."""
        descriptor = os.open(self._path, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return False
        self._held = descriptor
        return True
