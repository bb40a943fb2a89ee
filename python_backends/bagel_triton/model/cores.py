"""The processor's cores, left to whoever computes.

On a CPU every thread that computes has a team of OpenMP threads of its own, which waits
for the next operation by spinning. As soon as a process has more of them than cores, busy
or not, all teams sleep between operations instead, and to be woken takes longer than most
operations do: an elementwise one over 262,144 numbers took 13 us beside no idle team, and
50 to 110 us beside one, on 2 cores.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

PAUSE_SOFT = 1  # omp_pause_soft: what was set, such as the number of threads, is kept


def _find() -> Callable[[int], int] | None:
    try:
        pause: Callable[[int], int] = ctypes.CDLL(None).omp_pause_resource_all
    except AttributeError:  # this torch computes without OpenMP 5
        return None
    return pause


_pause = _find()


def release_team() -> None:
    """End the calling thread's team, where it has one; its next operation starts another, in some 50 us."""
    if _pause is not None:
        _pause(PAUSE_SOFT)
