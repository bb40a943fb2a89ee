"""Files in POSIX shared memory: their locks, and memory that is there before it is written to.

A lock tells whether the process that took it still lives. The kernel drops it with the process,
however that ends. Process ids prove nothing: they are reused, and containers that share
memory do not share them. A process that forks without exec shares its locks with the child.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

SHM_DIRECTORY = Path("/dev/shm")


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
        purpose: what the bytes are for, as the error names it.

    Raises:
        MemoryError: shared memory is too small.
    """
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        raise MemoryError(
            f"{purpose}: {SHM_DIRECTORY} has no room for {size} bytes ({error.strerror}): raise --shm-size"
        ) from error
