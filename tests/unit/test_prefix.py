"""Shared memory: a server removes its own files, and a dead server's, but never a living one's."""

import subprocess
import sys
from pathlib import Path

import pytest

from bagel_triton.ipc.shm import SharedMemoryPrefix, SharedMemoryUnavailable, sweep_leftovers

CLAIM_AND_DIE = """
import os, signal, sys
from pathlib import Path
from bagel_triton.ipc.shm import SharedMemoryPrefix
directory = Path(sys.argv[1])
shared = SharedMemoryPrefix(directory)
(directory / f"{shared.prefix}_kv").write_bytes(b"x")
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_files_of_a_server_go_with_it_and_no_others(tmp_path: Path):
    other = tmp_path / "bagel_triton_else"
    other.touch()
    with SharedMemoryPrefix(tmp_path) as shared:
        (tmp_path / f"{shared.prefix}_kv").touch()
        (tmp_path / f"{shared.prefix}_triton_1").touch()
    assert list(tmp_path.iterdir()) == [other]


def test_two_servers_of_one_process_share_nothing(tmp_path: Path):
    with SharedMemoryPrefix(tmp_path) as first, SharedMemoryPrefix(tmp_path) as second:
        assert first.prefix != second.prefix


def test_a_killed_servers_files_are_swept(tmp_path: Path):
    subprocess.run([sys.executable, "-c", CLAIM_AND_DIE, str(tmp_path)], check=False)
    left = {path.name for path in tmp_path.iterdir()}
    assert len(left) == 2
    (prefix,) = sweep_leftovers(tmp_path)
    assert left == {f"{prefix}.lock", f"{prefix}_kv"}
    assert list(tmp_path.iterdir()) == []


def test_a_living_servers_files_are_not_swept(tmp_path: Path):
    with SharedMemoryPrefix(tmp_path) as shared:
        pool = tmp_path / f"{shared.prefix}_kv"
        pool.touch()
        assert sweep_leftovers(tmp_path) == []
        assert pool.exists()


def test_files_of_no_supervisor_are_not_swept(tmp_path: Path):
    pool = tmp_path / "bagel_triton_kv"
    pool.touch()
    assert sweep_leftovers(tmp_path) == []
    assert pool.exists()


def test_no_shared_memory_is_a_clear_error(tmp_path: Path):
    with pytest.raises(SharedMemoryUnavailable, match=r"shared memory in .*absent cannot be used"):
        SharedMemoryPrefix(tmp_path / "absent")


def test_a_server_that_clears_its_files_keeps_its_claim(tmp_path: Path) -> None:
    with SharedMemoryPrefix(tmp_path) as shared:
        for name in (f"{shared.prefix}_kv_1", f"{shared.prefix}_stage_dit.1", "another_1"):
            (tmp_path / name).touch()
        shared.clear()
        assert {path.name for path in tmp_path.iterdir()} == {f"{shared.prefix}.lock", "another_1"}
        assert sweep_leftovers(tmp_path) == []
