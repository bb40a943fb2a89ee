"""What the supervisor tells a model: how often something had to be started again, and that it ends.

The supervisor counts reloads, and only a process of Triton can put a number on ``/metrics``.
And of a tritonserver that is told to stop, no stub hears before every request has ended: a
long one would be cut off, unanswered. So both are in a file in shared memory. ``bagel`` heeds
it, or a stage where the server has no ``bagel``: see :attr:`DeployConfig.heeding`.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Protocol

import msgspec

from bagel_triton.ipc.liveness import DIRECTORY

SERVER = "tritonserver"
POLL_S = 0.25


class Counters(Protocol):
    """Counters that may outlive who counts."""

    def count_up_to(self, name: str, total: int, **labels: str) -> None:
        """``name`` is ``total`` now."""


class _ControlMessage(msgspec.Struct, forbid_unknown_fields=True):
    reloads: dict[str, int]
    stopping: bool = False


class ControlFile:
    """The supervisor's side: the file ``PREFIX_notices``."""

    def __init__(self, prefix: str, directory: Path = DIRECTORY) -> None:
        self._path = _path(prefix, directory)
        self._notice = _ControlMessage({})
        self._write()

    def reloaded(self, name: str) -> None:
        """A stage, or :data:`SERVER`, was started once more; also after the old one's files were swept away."""
        self._notice.reloads[name] = self._notice.reloads.get(name, 0) + 1
        self._write()

    def stop(self) -> None:
        """What is still in flight shall end."""
        self._notice.stopping = True
        self._write()

    def _write(self) -> None:
        unfinished = self._path.with_name(f"{self._path.name}.new")
        unfinished.write_bytes(msgspec.json.encode(self._notice))
        unfinished.rename(self._path)


def start_watching(prefix: str, counters: Counters, closing: threading.Event) -> None:
    """:func:`watch_control_file`, on a thread of its own."""
    threading.Thread(target=watch_control_file, args=(prefix, counters, closing), name="notices", daemon=True).start()


def watch_control_file(prefix: str, counters: Counters, closing: threading.Event, directory: Path = DIRECTORY) -> None:
    """Tell ``counters`` of the reloads, all so far and then each new one, until ``closing``.

    That is set when the server is to stop. Where no supervisor runs, nothing is told.
    """
    path, told = _path(prefix, directory), dict[str, int]()
    while True:
        notice = _read(path)
        for name, count in notice.reloads.items() - told.items():
            if name == SERVER:
                counters.count_up_to("server_restarts", count)
            else:
                counters.count_up_to("stage_reloads", count, stage=name)
        told = notice.reloads
        if notice.stopping:
            closing.set()
        if closing.wait(POLL_S):
            return


def _read(path: Path) -> _ControlMessage:
    try:
        return msgspec.json.decode(path.read_bytes(), type=_ControlMessage)
    except FileNotFoundError:
        return _ControlMessage({})


def _path(prefix: str, directory: Path) -> Path:
    return directory / f"{prefix}_notices"
