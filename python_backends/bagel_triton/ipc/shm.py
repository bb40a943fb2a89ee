"""A server's files in POSIX shared memory: their common prefix, their locks, and memory reserved before it is written.

A lock tells whether the process that took it still lives. The kernel drops it with the process,
however that ends. Process ids prove nothing: they are reused, and containers that share
memory do not share them. A process that forks without exec shares its locks with the child.
"""

from __future__ import annotations

import fcntl
import os
import secrets
from pathlib import Path
from types import TracebackType
from typing import Self

SHM_DIRECTORY = Path("/dev/shm")
NAME = "bagel_triton"
LOCK_SUFFIX = ".lock"


def open_locked(path: Path, *, create: bool = False, shared: bool = False, wait: bool = False) -> int | None:
    """Open the file at ``path`` and lock it until the descriptor is closed.

    Args:
        create: make the file, readable for its user alone, where there is none.
        shared: let other processes hold shared locks at the same time; the file is opened for reading.
        wait: wait for processes whose locks exclude this one.

    Returns:
        A descriptor. None if another process holds a lock, or if the file was removed or replaced
        while this one was being taken.

    Raises:
        OSError: the file cannot be opened.
    """
    flags = (os.O_RDONLY if shared else os.O_RDWR) | (os.O_CREAT if create else 0) | os.O_CLOEXEC
    descriptor = os.open(path, flags, 0o600)
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
        if os.path.samestat(os.fstat(descriptor), path.stat()):
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def is_locked(path: Path) -> bool:
    """Whether a living process holds the exclusive lock of ``path``; False where there is no such file."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def reserve(descriptor: int, size: int, purpose: str) -> None:
    """Give the open file ``size`` bytes of memory, so that no later write to a mapping is a bus error.

    Args:
        purpose: use of the bytes, for the error.

    Raises:
        MemoryError: shared memory is too small.
    """
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        raise MemoryError(
            f"{purpose}: {SHM_DIRECTORY} has no room for {size} bytes ({error.strerror}): raise --shm-size"
        ) from error


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
