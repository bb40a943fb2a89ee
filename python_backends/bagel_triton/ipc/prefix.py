"""A server's files in shared memory: all have one prefix, which the server holds the lock of."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from types import TracebackType
from typing import Self

from bagel_triton.ipc.shm import SHM_DIRECTORY, open_locked

NAME = "bagel_triton"
LOCK_SUFFIX = ".lock"


class SharedMemoryUnavailable(ValueError):
    """The folder of shared memory cannot be written; the message says why."""


class SharedMemoryPrefix:
    """One server's claim on a new prefix; on exit, every file under it is removed.

    Raises:
        SharedMemoryUnavailable: the shared-memory folder cannot be written.
    """

    def __init__(self, directory: Path = SHM_DIRECTORY) -> None:
        self._directory = directory
        # The id is for people; the token keeps apart containers that share memory but no ids.
        self.prefix = f"{NAME}_{os.getpid()}_{secrets.token_hex(4)}"
        try:
            # A sweep may remove the file before it is locked.
            while (lock := open_locked(_lock_path(directory, self.prefix), create=True)) is None:
                pass
        except OSError as error:
            raise SharedMemoryUnavailable(f"shared memory in {directory} cannot be used: {error.strerror}") from error
        self._lock = lock

    def clear(self) -> None:
        """Remove every file under the prefix, and keep the claim."""
        _remove_files(self._directory, self.prefix)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _remove_all(self._directory, self.prefix)
        os.close(self._lock)


def sweep_leftovers(directory: Path = SHM_DIRECTORY) -> list[str]:
    """Remove the files of servers that died without doing so, and return their prefixes.

    Files of another user stay.
    """
    swept = []
    for path in directory.glob(f"{NAME}_*{LOCK_SUFFIX}"):
        try:
            lock = open_locked(path)
        except (FileNotFoundError, PermissionError):  # swept by another process, or another user's
            continue
        if lock is None:
            continue
        prefix = path.name.removesuffix(LOCK_SUFFIX)
        _remove_all(directory, prefix)
        os.close(lock)
        swept.append(prefix)
    return swept


def _lock_path(directory: Path, prefix: str) -> Path:
    return directory / f"{prefix}{LOCK_SUFFIX}"


def _remove_all(directory: Path, prefix: str) -> None:
    """Remove every file under ``prefix``, the lock file last."""
    _remove_files(directory, prefix)
    _lock_path(directory, prefix).unlink(missing_ok=True)


def _remove_files(directory: Path, prefix: str) -> None:
    for path in directory.glob(f"{prefix}*"):
        if path != _lock_path(directory, prefix):
            path.unlink(missing_ok=True)
