"""The ranks of a stage but the first, as rank 0 has them, and how they are started on this host.

:mod:`bagel_triton.parallel.actors` starts them by Ray, on others as well.
"""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import sys
from typing import Protocol, Self

LOOPBACK = "127.0.0.1"


class Rank(Protocol):
    """A rank other than 0: a connection whose end is the end of both, and a life."""

    connection: socket.socket
    is_here: bool  # on rank 0's host, so that it may map shared memory

    def __str__(self) -> str: ...

    def wait(self) -> str:
        """Wait for its end; returns how that came."""

    def close(self) -> None:
        """Let it end."""

    def reap(self, timeout_s: float) -> None:
        """Wait for its end after :meth:`close`, and force it after ``timeout_s`` seconds."""


class RankProcess:
    """A rank that is a child of this process."""

    is_here = True

    def __init__(self, process: subprocess.Popen[bytes], connection: socket.socket) -> None:
        self._process, self.connection = process, connection

    @classmethod
    def start(cls) -> Self:
        """Start one; it waits for its first message."""
        python = sys.executable or shutil.which("python3") or "python3"  # of Triton's stub, that on its PATH
        ours, theirs = socket.socketpair()
        with theirs:
            process = subprocess.Popen([python, "-P", "-m", "bagel_triton.parallel.worker"], stdin=theirs.fileno())
        return cls(process, ours)

    def __str__(self) -> str:
        return f"process {self._process.pid}"

    def wait(self) -> str:
        """Wait for its end; returns its exit status, in words."""
        return f"has ended with status {self._process.wait()}"

    def close(self) -> None:
        """Close its connection, at whose end it exits."""
        hang_up(self.connection)

    def reap(self, timeout_s: float) -> None:
        """Wait for its exit, or kill it."""
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def hang_up(connection: socket.socket) -> None:
    """Close a connection that another thread may be reading."""
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()
