"""A server of a process's own: ``bagel-triton serve`` on free ports, stopped in the end."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from bagel_triton.serving.command_error import CommandError

STOP_TIMEOUT_S = 20.0  # the server's own promise is 15


@dataclass(frozen=True)
class ServerProcess:
    """A server that is ready; ``lines`` are those it printed until then."""

    lines: tuple[str, ...]

    @property
    def url(self) -> str:
        """Of the OpenAI API."""
        return self.lines[-1].split()[1]

    def address(self, name: str) -> str:
        """What the server printed as ``name``, such as the address of ``Triton gRPC``."""
        return next(line.strip().removeprefix(name).strip() for line in self.lines if line.strip().startswith(name))


@contextlib.contextmanager
def running(
    checkpoint: Path, *options: str, show: Callable[[str], None] = lambda line: None
) -> Iterator[ServerProcess]:
    """A server of ``checkpoint``; ``show`` is given what it prints before it is ready and when it stops.

    Raises:
        CommandError: it did not start, or did not stop as it should.
    """
    command = [sys.executable, "-m", "bagel_triton.serving.cli", "serve", str(checkpoint), "--port", "0", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            ready = ServerProcess(tuple(_until_ready(server, show)))
            assert server.stdout is not None, "it is a pipe"
            rest: list[str] = []
            # What it prints meanwhile must not fill the pipe.
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
    """The server ended before it was ready, with exit status ``status``; it has said why."""

    def __init__(self, status: int) -> None:
        super().__init__(f"the server did not start: exit status {status}")
        self.status = status
