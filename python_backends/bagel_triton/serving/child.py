"""A child that ends when its parent does: ``child.py PARENT_PID COMMAND...``.

Run as a program, it asks the kernel for its own death at the parent's and then becomes
the command. Doing so between fork and exec of the parent, which has threads, would not
be safe.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36


def command(argv: list[str]) -> list[str]:
    """``argv``, to be started by this process and to end with it."""
    return [sys.executable, "-I", "-S", __file__, str(os.getpid()), *argv]


def adopt_orphans() -> None:
    """Make this process the parent of its descendants whose own parent ends.

    They can then be waited for, also where the first process of a container does not.
    """
    _prctl(PR_SET_CHILD_SUBREAPER, 1)


def become(parent: int, argv: list[str]) -> None:
    """Replace this process by ``argv``, killed when the process ``parent`` ends."""
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the request
        sys.exit(1)
    os.execv(argv[0], argv)


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option})")


if __name__ == "__main__":
    become(int(sys.argv[1]), sys.argv[2:])
