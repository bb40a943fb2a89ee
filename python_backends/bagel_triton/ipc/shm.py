"""Files in POSIX shared memory, whose pages are there before anybody writes to them."""

from __future__ import annotations

import os
from pathlib import Path

SHM_DIRECTORY = Path("/dev/shm")


def reserve(descriptor: int, size: int, purpose: str) -> None:
    """Give the open file ``size`` bytes of memory, so that no later write to a mapping is a bus error.

    Args:
        purpose: what the bytes are for, as the error shall name it.

    Raises:
        MemoryError: shared memory is too small.
    """
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        raise MemoryError(
            f"{purpose}: {SHM_DIRECTORY} has no room for {size} bytes ({error.strerror}): raise --shm-size"
        ) from error
