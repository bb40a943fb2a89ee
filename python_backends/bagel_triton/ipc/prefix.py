"""A server's files in shared memory: one prefix for all of them, and their sweep.

A lock file tells a living server's files from a dead one's leftovers. The kernel drops
the lock with the process, whatever ended it, so no process id is ever trusted: ids are
reused, and containers that share memory do not share them.
"""

from __future__ import annotations

import fcntl
import os
import secrets
from pathlib import Path
from types import TracebackType
from typing import Self

DIRECTORY = Path("/dev/shm")
NAME = "bagel_triton"
LOCK_SUFFIX = ".lock"


class SharedMemoryUnavailable(ValueError):
    """The folder of shared memory cannot be written; the message says why."""


class SharedMemoryPrefix:
    """The claim of one server on a prefix; on exit, every file under it is removed.

    Raises:
        SharedMemoryUnavailable: the shared-memory folder cannot be written.
    """

    def __init__(self, directory: Path = DIRECTORY) -> None:
        self._directory = directory
        # The id is for a reader; the token keeps apart containers that share memory but no ids.
        self.prefix = f"{NAME}_{os.getpid()}_{secrets.token_hex(4)}"
        path = directory / f"{self.prefix}{LOCK_SUFFIX}"
        try:
            while (lock := _lock(path, os.O_CREAT)) is None:  # a sweep came between
                pass
        except OSError as error:
            raise SharedMemoryUnavailable(f"shared memory in {directory} cannot be used: {error.strerror}") from error
        self._lock = lock

    def clear(self) -> None:
        """Remove every file under the prefix, and keep the claim."""
        _remove_all_but(self._directory / f"{self.prefix}{LOCK_SUFFIX}", self._directory, self.prefix)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _remove(self._directory, self.prefix)
        os.close(self._lock)


def sweep_leftovers(directory: Path = DIRECTORY) -> list[str]:
    """Remove the files of servers that died without doing so; their prefixes.

    Files of another user are left alone.
    """
    swept = []
    for path in directory.glob(f"{NAME}_*{LOCK_SUFFIX}"):
        try:
            lock = _lock(path)
        except (FileNotFoundError, PermissionError):  # swept by another, or another user's
            continue
        if lock is None:
            continue
        prefix = path.name.removesuffix(LOCK_SUFFIX)
        _remove(directory, prefix)
        os.close(lock)
        swept.append(prefix)
    return swept


def _lock(path: Path, flags: int = 0) -> int | None:
    """A descriptor that holds the lock of ``path``; None when a living process holds it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | flags, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # A sweep may have removed the file between its opening and its locking.
        if os.path.samestat(os.fstat(descriptor), path.stat()):
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(descriptor)
    return None


def _remove(directory: Path, prefix: str) -> None:
    """Remove what starts with ``prefix``, the lock file last."""
    lock = directory / f"{prefix}{LOCK_SUFFIX}"
    _remove_all_but(lock, directory, prefix)
    lock.unlink(missing_ok=True)


def _remove_all_but(lock: Path, directory: Path, prefix: str) -> None:
    for path in directory.glob(f"{prefix}*"):
        if path != lock:
            path.unlink(missing_ok=True)
