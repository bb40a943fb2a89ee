"""Liveness of stage processes: each holds the lock of a file that identifies it.

Triton keeps reporting a model as ready after its process was killed, and never answers a
decoupled request that was in flight. So every stage process announces itself once it is
built: a file ``PREFIX_stage_STAGE.TOKEN`` in shared memory, locked for the life of the
process. The kernel drops the lock however the process ends. Process ids are reused and
therefore not trusted. A child forked without exec would share the lock.

A file with a free lock belongs to a dead process. The watchdog removes it after it has
replaced the process, so a stage counts as dead until it is back.
"""

from __future__ import annotations

import os
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from bagel_triton.ipc.shm import SHM_DIRECTORY, is_locked, open_locked
from bagel_triton.protocol.intervals import WATCH_S

LAST_WORDS_S = 3.0


def end_when(lost: Callable[[], bool]) -> None:
    """End this process soon after ``lost`` is true, so that the watchdog starts another."""

    def watch() -> None:
        while not lost():
            time.sleep(WATCH_S)
        time.sleep(LAST_WORDS_S)
        os._exit(1)

    threading.Thread(target=watch, name="end_when_lost", daemon=True).start()


class _Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The content of a file: the process, and the files that Triton made for it in shared memory."""

    stage: str
    pid: int
    regions: tuple[str, ...]


class Announcement:
    """Announces this process as one of ``stage``, until :meth:`withdraw` or its death."""

    def __init__(self, prefix: str, stage: str, directory: Path = SHM_DIRECTORY) -> None:
        token = secrets.token_hex(4)
        # It gets its name once it is locked: unlocked it would look like a dead process's.
        unnamed = directory / f"{prefix}_announcing.{token}"
        self._path = directory / f"{prefix}_stage_{stage}.{token}"
        lock = open_locked(unnamed, create=True)
        assert lock is not None, "no other process knows the name"
        self._lock = lock
        os.write(self._lock, msgspec.json.encode(_Record(stage, os.getpid(), _regions(prefix, directory))))
        unnamed.rename(self._path)

    @property
    def lock_name(self) -> str:
        """The file's name, by which another process can see whether this one still lives."""
        return self._path.name

    def withdraw(self) -> None:
        """Remove the announcement: the process is about to end."""
        self._path.unlink(missing_ok=True)
        os.close(self._lock)


@dataclass(frozen=True)
class StageProcess:
    """An announced process."""

    stage: str
    pid: int
    path: Path
    regions: tuple[str, ...] = ()

    @property
    def alive(self) -> bool:
        """Whether it runs and has not withdrawn."""
        return is_locked(self.path)

    def remove(self) -> None:
        """Remove a dead process's files from shared memory."""
        for region in self.regions:
            self.path.with_name(region).unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)


def processes(prefix: str, stage: str = "*", directory: Path = SHM_DIRECTORY) -> list[StageProcess]:
    """Every announced process of ``stage`` (of all stages by default), dead ones included."""
    found = []
    for path in sorted(directory.glob(f"{prefix}_stage_{stage}.*")):
        try:
            record = msgspec.json.decode(path.read_bytes(), type=_Record)
        except FileNotFoundError:  # withdrawn meanwhile
            continue
        found.append(StageProcess(record.stage, record.pid, path, record.regions))
    return found


def holds_lock(name: str, directory: Path = SHM_DIRECTORY) -> bool:
    """Whether the process still lives whose :attr:`Announcement.lock_name` is ``name``."""
    return "/" not in name and is_locked(directory / name)


def dead_stages(prefix: str, directory: Path = SHM_DIRECTORY) -> dict[str, list[StageProcess]]:
    """The processes that died and have not been replaced, by stage."""
    dead: dict[str, list[StageProcess]] = {}
    for process in processes(prefix, directory=directory):
        # A file that is gone by now was withdrawn.
        if not process.alive and process.path.exists():
            dead.setdefault(process.stage, []).append(process)
    return dead


def watch(prefix: str, stage: str, directory: Path = SHM_DIRECTORY) -> Callable[[], bool]:
    """A function that tells whether every process of ``stage`` that lives now still does.

    All of them count, because it is unknown which one has a given request. Processes that are
    already dead are ignored unless all are. A stage without announcements counts as alive.
    """
    announced = processes(prefix, stage, directory)
    living = [process for process in announced if process.alive]
    if announced and not living:
        return lambda: False
    return lambda: all(process.alive for process in living)


def _regions(prefix: str, directory: Path) -> tuple[str, ...]:
    """Names of the mapped files that Triton made for this process. It forgets those of a killed one."""
    start = f"{directory}/{region_prefix(prefix)}"
    mapped = {line.split(maxsplit=5)[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
    return tuple(sorted(Path(name).name for name in mapped if name.startswith(start)))


def region_prefix(prefix: str) -> str:
    """The prefix of Triton's own files in shared memory."""
    return f"{prefix}_triton_"
