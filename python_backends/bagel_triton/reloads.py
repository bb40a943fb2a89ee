"""How often the supervisor had to give a stage new processes, or tritonserver itself.

The supervisor counts, and only a process of Triton can put a number on ``/metrics``: so the
counts are a file in shared memory, which ``bagel`` reads.
"""

from __future__ import annotations

import threading
from collections import Counter
from pathlib import Path

import msgspec

from bagel_triton.engine.metrics import Metrics
from bagel_triton.liveness import DIRECTORY

SERVER = "tritonserver"
POLL_S = 1.0


class Reloads:
    """The supervisor's counts, in the file ``PREFIX_reloads``."""

    def __init__(self, prefix: str, directory: Path = DIRECTORY) -> None:
        self._path = _path(prefix, directory)
        self._counts: Counter[str] = Counter()
        self.write()

    def add(self, name: str) -> None:
        """One more, of a stage or of :data:`SERVER`."""
        self._counts[name] += 1
        self.write()

    def write(self) -> None:
        """Write the file, also where it has been swept away with the rest of a tritonserver's."""
        unfinished = self._path.with_name(f"{self._path.name}.new")
        unfinished.write_bytes(msgspec.json.encode(self._counts))
        unfinished.rename(self._path)


def read(prefix: str, directory: Path = DIRECTORY) -> dict[str, int]:
    """The counts; none where no supervisor keeps them."""
    try:
        return msgspec.json.decode(_path(prefix, directory).read_bytes(), type=dict[str, int])
    except FileNotFoundError:
        return {}


def tell(prefix: str, metrics: Metrics, closing: threading.Event, directory: Path = DIRECTORY) -> None:
    """Count what is in the file until ``closing``: all of it at first, then what is added."""
    told: Counter[str] = Counter()
    while True:
        for name, count in read(prefix, directory).items():
            if new := count - told[name]:
                if name == SERVER:
                    metrics.count("server_restarts", new)
                else:
                    metrics.count("stage_reloads", new, stage=name)
            told[name] = count
        if closing.wait(POLL_S):
            return


def _path(prefix: str, directory: Path) -> Path:
    return directory / f"{prefix}_reloads"
