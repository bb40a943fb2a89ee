"""What the supervisor tells ``bagel``: how often something had to be started again, and that it ends.

The supervisor counts reloads, and only a process of Triton can put a number on ``/metrics``.
And of a tritonserver that is told to stop, no stub hears before every request has ended: a
long one would be cut off, unanswered. So both are in a file in shared memory.
"""

from __future__ import annotations

import threading
from collections import Counter
from pathlib import Path

import msgspec

from bagel_triton.engine.metrics import Metrics
from bagel_triton.liveness import DIRECTORY

SERVER = "tritonserver"
POLL_S = 0.25


class _Notice(msgspec.Struct, forbid_unknown_fields=True):
    reloads: dict[str, int]
    stopping: bool = False


class Notices:
    """The supervisor's side: the file ``PREFIX_notices``."""

    def __init__(self, prefix: str, directory: Path = DIRECTORY) -> None:
        self._path = _path(prefix, directory)
        self._notice = _Notice({})
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


def heed(prefix: str, metrics: Metrics, closing: threading.Event, directory: Path = DIRECTORY) -> None:
    """Count reloads, all so far and then each new one, until ``closing``; set that when the server is to stop.

    Where no supervisor runs, nothing is told.
    """
    path, told = _path(prefix, directory), Counter[str]()
    while True:
        notice = _read(path)
        for name, count in notice.reloads.items():
            if new := count - told[name]:
                if name == SERVER:
                    metrics.count("server_restarts", new)
                else:
                    metrics.count("stage_reloads", new, stage=name)
            told[name] = count
        if notice.stopping:
            closing.set()
        if closing.wait(POLL_S):
            return


def _read(path: Path) -> _Notice:
    try:
        return msgspec.json.decode(path.read_bytes(), type=_Notice)
    except FileNotFoundError:
        return _Notice({})


def _path(prefix: str, directory: Path) -> Path:
    return directory / f"{prefix}_notices"
