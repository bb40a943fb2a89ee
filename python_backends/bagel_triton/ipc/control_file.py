"""Messages of the supervisor to a model: restart counts, the servers of stage 1, and that the server is stopping.

The supervisor counts reloads, but only a process of Triton can put a number on ``/metrics``.
And tritonserver informs its stubs that it stops only once every request has ended, so a long
one would be cut off unanswered. Servers of stage 1 come and go, and register with the
supervisor. It writes all of this to a file in shared memory. The orchestrators watch it, or a
stage where the server has none: see :attr:`DeployConfig.control_model`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import msgspec

from bagel_triton.ipc.shm import SHM_DIRECTORY
from bagel_triton.protocol.intervals import WATCH_S

SERVER = "tritonserver"


class Counters(Protocol):
    """Counters whose totals another process keeps."""

    def count_up_to(self, name: str, total: int, **labels: str) -> None:
        """Raise the counter ``name`` to ``total``."""


class _ControlMessage(msgspec.Struct, forbid_unknown_fields=True):
    reloads: dict[str, int]
    stopping: bool = False
    replicas: list[str] | None = None  # None where the configuration alone says where they are


class ControlFile:
    """The supervisor's side: the file ``PREFIX_control``."""

    def __init__(self, prefix: str, directory: Path = SHM_DIRECTORY) -> None:
        self._path = _path(prefix, directory)
        self._message = _ControlMessage({})
        self._write()

    def reloaded(self, name: str) -> None:
        """Count a restart of a stage, or of :data:`SERVER`; the file may have been swept with the old server's."""
        self._message.reloads[name] = self._message.reloads.get(name, 0) + 1
        self._write()

    def set_replicas(self, addresses: Sequence[str]) -> None:
        """Make the server call stage 1 at these gRPC addresses."""
        self._message.replicas = list(addresses)
        self._write()

    def stop(self) -> None:
        """Make the server's models end all requests in flight."""
        self._message.stopping = True
        self._write()

    def _write(self) -> None:
        unfinished = self._path.with_name(f"{self._path.name}.new")
        unfinished.write_bytes(msgspec.json.encode(self._message))
        unfinished.rename(self._path)


def start_watching(
    prefix: str,
    counters: Counters,
    closing: threading.Event,
    replicas: Callable[[Sequence[str]], None] | None = None,
) -> None:
    """Run :func:`watch_control_file` on a thread of its own."""
    threading.Thread(
        target=watch_control_file,
        args=(prefix, counters, closing),
        kwargs={"replicas": replicas},
        name="control-file",
        daemon=True,
    ).start()


def watch_control_file(
    prefix: str,
    counters: Counters,
    closing: threading.Event,
    directory: Path = SHM_DIRECTORY,
    replicas: Callable[[Sequence[str]], None] | None = None,
) -> None:
    """Keep ``counters`` at the supervisor's totals, and set ``closing`` when the server stops; return then.

    ``replicas`` is called with the addresses of stage 1 when they change. Without a supervisor there is no file and
    nothing changes.
    """
    path, counted = _path(prefix, directory), dict[str, int]()
    addresses: list[str] | None = None
    while True:
        message = _read(path)
        for name, count in message.reloads.items() - counted.items():
            if name == SERVER:
                counters.count_up_to("server_restarts", count)
            else:
                counters.count_up_to("stage_reloads", count, stage=name)
        counted = message.reloads
        if replicas is not None and message.replicas is not None and message.replicas != addresses:
            addresses = message.replicas
            replicas(addresses)
        if message.stopping:
            closing.set()
        if closing.wait(WATCH_S):
            return


def _read(path: Path) -> _ControlMessage:
    try:
        return msgspec.json.decode(path.read_bytes(), type=_ControlMessage)
    except FileNotFoundError:
        return _ControlMessage({})


def _path(prefix: str, directory: Path) -> Path:
    return directory / f"{prefix}_control"
