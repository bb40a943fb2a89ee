"""A process is known to live by the lock it holds, whatever ends it."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from pathlib import Path

from bagel_triton.ipc.liveness import Announcement, dead_stages, processes, region_prefix, watch
from tests.support.stage_process import PREFIX, AnnouncedProcess
from tests.support.waiting import soon


def test_a_killed_process_is_dead_before_anyone_waits_for_it(tmp_path: Path) -> None:
    with AnnouncedProcess(tmp_path, "dit") as process:
        alive = watch(PREFIX, "dit", tmp_path)
        assert alive()
        assert dead_stages(PREFIX, tmp_path) == {}
        process.kill()  # not reaped yet: its id is still taken
        assert soon(lambda: not alive())
        assert os.path.exists(f"/proc/{process.pid}")  # noqa: PTH110
        [dead] = dead_stages(PREFIX, tmp_path)["dit"]
        assert (dead.stage, dead.pid) == ("dit", process.pid)


def test_a_process_that_withdrew_is_neither_alive_nor_dead(tmp_path: Path) -> None:
    with AnnouncedProcess(tmp_path, "dit") as process:
        alive = watch(PREFIX, "dit", tmp_path)
        process.withdraw()
        assert not alive(), "it can answer nothing any more"
        assert dead_stages(PREFIX, tmp_path) == {}
        assert list(tmp_path.iterdir()) == []


def test_one_dead_process_of_two_is_only_noticed_by_earlier_watchers(tmp_path: Path) -> None:
    with AnnouncedProcess(tmp_path, "cfg_expand") as first, AnnouncedProcess(tmp_path, "cfg_expand"):
        before = watch(PREFIX, "cfg_expand", tmp_path)
        first.kill()
        assert soon(lambda: not before())
        after = watch(PREFIX, "cfg_expand", tmp_path)
        assert after(), "the other process still serves"


def test_a_stage_whose_processes_are_all_dead_is_dead_from_the_start(tmp_path: Path) -> None:
    with AnnouncedProcess(tmp_path, "dit") as process:
        process.kill()
        assert soon(lambda: not watch(PREFIX, "dit", tmp_path)())
        assert watch(PREFIX, "thinker", tmp_path)(), "it never announced itself"
        assert watch("test_2", "dit", tmp_path)(), "another server's is its own"


def test_a_new_process_does_not_bring_back_what_the_dead_one_had(tmp_path: Path) -> None:
    with AnnouncedProcess(tmp_path, "dit") as process:
        alive = watch(PREFIX, "dit", tmp_path)
        process.kill()
        with AnnouncedProcess(tmp_path, "dit"):
            assert soon(lambda: not alive())
            assert watch(PREFIX, "dit", tmp_path)()


def test_what_triton_made_for_a_dead_process_is_removed_with_its_file(tmp_path: Path) -> None:
    own, others = (tmp_path / f"{region_prefix(PREFIX)}{name}" for name in ("own", "others"))
    for path in (own, others):
        path.write_bytes(bytes(mmap.PAGESIZE))
    with own.open("r+b") as file, mmap.mmap(file.fileno(), 0):
        announcement = Announcement(PREFIX, "dit", tmp_path)
    [process] = processes(PREFIX, directory=tmp_path)
    assert process.alive
    assert (process.pid, process.regions) == (os.getpid(), (own.name,))
    process.remove()
    assert list(tmp_path.iterdir()) == [others]
    announcement.withdraw()


def test_a_process_that_lost_its_device_ends_to_be_replaced() -> None:
    program = """
import threading
from bagel_triton.ipc import liveness
liveness.LAST_WORDS_S = 0.0
lost = threading.Event()
liveness.end_when(lost.is_set)
lost.set()
threading.Event().wait(60)
"""
    ended = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True)
    assert (ended.returncode, ended.stderr) == (1, b"")
