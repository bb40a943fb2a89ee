"""Processes and signals: a child that ends with its parent, signals that stop a server, a server as a child."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from bagel_triton.serving import CommandError

GRACE_S = 3.0  # for requests in flight at a shutdown, before they are aborted
PR_SET_CHILD_SUBREAPER = 36
# It becomes two: the command, and a shell that kills their process group when the pipe on their standard input closes.
# A stub that waits for a killed tritonserver may hold the interpreter's lock for ever, so no thread of it can do this.
_WITH_GUARD = """
import os, sys
if os.fork() == 0:
    os.execv("/bin/sh", ["sh", "-c", "read -r never; kill -KILL 0"])
os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
os.execv(sys.argv[1], sys.argv[1:])
"""


def log_event(message: str) -> None:
    """Print one line of a running server's log, with the time of day."""
    print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {message}", flush=True)


def guarded(argv: list[str]) -> list[str]:
    """The command that runs ``argv`` and kills its process group as soon as its standard input, a pipe, is closed.

    The kernel closes the pipe however the process that holds its other end may die. Start it in a session of its own.
    """
    return [sys.executable, "-I", "-S", "-c", _WITH_GUARD, *argv]


def adopt_orphans() -> None:
    """Make this process the parent of its descendants whose own parent ends.

    They can then be waited for, also where the first process of a container does not.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Stopped(BaseException):
    """A signal came while the server was starting; no ``except Exception`` on the way may hold it up."""


class StopSignals:
    """Turns SIGTERM, SIGINT and SIGHUP into a stop.

    Within the context the first signal raises :class:`Stopped`, wherever the program is, and later ones are ignored.
    After :meth:`awaited` a signal only sets an event.
    """

    def __init__(self) -> None:
        self._came = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._stop)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def awaited(self) -> asyncio.Event:
        """The event that a signal sets from now on, in the running event loop."""
        event = asyncio.Event()
        for number in SIGNALS:
            asyncio.get_running_loop().add_signal_handler(number, event.set)
        if self._came:  # and Stopped was swallowed, as in a callback of the interpreter's own
            event.set()
        return event

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._came = True
        for other in SIGNALS:  # a second one must not cut the shutdown short
            signal.signal(other, signal.SIG_IGN)
        raise Stopped


STOP_TIMEOUT_S = 20.0  # the server's own promise is 15


@dataclass(frozen=True)
class ServerProcess:
    """A server that is ready; ``lines`` are those that it printed until then."""

    lines: tuple[str, ...]

    @property
    def url(self) -> str:
        """Of the OpenAI API."""
        return self.lines[-1].split()[1]

    def address(self, name: str) -> str:
        """The value that the server printed for ``name``, such as the address of ``Triton gRPC``."""
        return next(line.strip().removeprefix(name).strip() for line in self.lines if line.strip().startswith(name))


@contextlib.contextmanager
def running(
    checkpoint: Path, *options: str, show: Callable[[str], None] = lambda line: None
) -> Iterator[ServerProcess]:
    """``bagel-triton serve`` of ``checkpoint`` in a process of its own, on free ports, stopped in the end.

    ``show`` is called with each line that it prints before it is ready and when it stops.

    Raises:
        CommandError: it did not start, or did not stop as it should.
    """
    # The caller prints the results of its own requests.
    options = ("--port", "0", "--no-access-log", *options)
    command = [sys.executable, "-m", "bagel_triton", "serve", str(checkpoint), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            ready = ServerProcess(tuple(_until_ready(server, show)))
            assert server.stdout is not None, "it is a pipe"
            rest: list[str] = []
            # Lines printed meanwhile must not fill the pipe.
            reader = threading.Thread(target=rest.extend, args=(server.stdout,), daemon=True)
            reader.start()
            yield ready
        finally:
            server.terminate()
            try:
                server.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                server.kill()
                raise CommandError(f"the server did not stop within {STOP_TIMEOUT_S:.0f} s") from None
        reader.join()
        for line in rest:
            show(line)
    if server.returncode != 0:
        raise CommandError(f"the server ended with exit status {server.returncode}")


def _until_ready(server: subprocess.Popen[str], show: Callable[[str], None]) -> Iterator[str]:
    assert server.stdout is not None, "it is a pipe"
    for line in server.stdout:
        show(line)
        yield line
        if line.startswith("READY "):
            return
    raise ServerNotStarted(server.wait() or 1)


class ServerNotStarted(CommandError):
    """The server ended before it was ready, with exit status ``status``; it has printed why."""

    def __init__(self, status: int) -> None:
        super().__init__(f"the server did not start: exit status {status}")
        self.status = status
