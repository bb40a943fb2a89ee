"""Weights that processes share: one copy, never half written, never written to, never another's."""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import signal
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bagel_triton.deploy.config import DeployConfig
from bagel_triton.ipc.shm import SHM_DIRECTORY, SharedMemoryPrefix, sweep_leftovers
from bagel_triton.pipeline.local import LocalStages
from bagel_triton.weights.checkpoint import Checkpoint
from bagel_triton.weights.sharing import WeightStore
from bagel_triton.weights.tiny import checkpoint as tiny_checkpoint
from bagel_triton.weights.tiny.config import TinyConfig
from tests.support.forkserver import FORKSERVER
from tests.support.weight_holder import mapping
from tests.support.weights import CPU, FILES, TINY, convert, hold, overwrite, sources

Start = Callable[..., tuple[Connection, BaseProcess]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a process that talks through a pipe; all are ended."""
    started: list[tuple[Connection, BaseProcess]] = []

    def run(target: Callable[..., None], *args: object) -> tuple[Connection, BaseProcess]:
        ours, theirs = FORKSERVER.Pipe()
        process = FORKSERVER.Process(target=target, args=(theirs, *args))
        process.start()
        theirs.close()
        started.append((ours, process))
        return ours, process

    yield run
    for pipe, process in started:
        process.kill()
        process.join()
        pipe.close()


@pytest.fixture
def prefix() -> Iterator[str]:
    """A prefix of this test's own files in the real shared memory."""
    name = f"bagel_triton_test_{os.getpid()}_{secrets.token_hex(4)}"
    yield name
    for path in SHM_DIRECTORY.glob(f"{name}*"):
        path.unlink()


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose transformer takes about 100 MB in float32."""
    directory = tmp_path_factory.mktemp("checkpoints") / "large"
    config = TinyConfig(hidden_size=512, layers=4, heads=8, kv_heads=2, intermediate_size=1024, vocab_size=1024)
    tiny_checkpoint.write(directory, config)
    return directory


def _ask(pipe: Connection, command: str) -> object:
    pipe.send(command)
    return pipe.recv()


def _converted(directory: Path, dtype: torch.dtype = torch.float32, prefix: str = "test") -> dict[str, Tensor]:
    return WeightStore(prefix, directory).converted(sources(), dtype, FILES)


def _check(tensors: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> None:
    expected = sources()
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name].to(dtype)) for name in expected)


def _names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_processes_share_one_copy_that_equals_a_private_one(start: Start, prefix: str, large: Path) -> None:
    pipes = []
    for _ in range(2):
        pipe, _process = start(hold, SHM_DIRECTORY, prefix, large)
        assert pipe.recv() == "loaded"
        pipes.append(pipe)
    (file,) = SHM_DIRECTORY.glob(f"{prefix}*")
    size = file.stat().st_size
    assert size > 90e6
    costs = [_ask(pipe, "measure") for pipe in pipes]
    assert sum(cost.pss for cost in costs) < 1.1 * size
    assert all(cost.anonymous < 0.1 * size for cost in costs)
    assert [_ask(pipe, "compare") for pipe in pipes] == [[], []]


def test_either_process_may_die_and_come_back(start: Start, prefix: str) -> None:
    writer, _ = start(hold, SHM_DIRECTORY, prefix, TINY)
    assert writer.recv() == "loaded"
    (file,) = SHM_DIRECTORY.glob(f"{prefix}*")
    inode = file.stat().st_ino
    reader, _ = start(hold, SHM_DIRECTORY, prefix, TINY)
    assert reader.recv() == "loaded"
    for dying in (writer, reader):
        dying.send("die")
        again, _ = start(hold, SHM_DIRECTORY, prefix, TINY)
        assert again.recv() == "loaded"
        assert _ask(again, "compare") == []
        assert [path.stat().st_ino for path in SHM_DIRECTORY.glob(f"{prefix}*")] == [inode]


def test_weights_stored_in_the_wanted_dtype_are_mapped_from_their_file(tmp_path: Path) -> None:
    """But for queries, keys and values, which no file has one after the other."""
    store, checkpoint = WeightStore("test", tmp_path), Checkpoint(TINY)
    autoencoder = checkpoint.load_autoencoder(CPU, torch.float32, store)
    assert _names(tmp_path) == []
    bagel = checkpoint.load_bagel(CPU, torch.bfloat16, store)
    (packed,) = tmp_path.iterdir()
    apart = checkpoint.stored_apart(torch.bfloat16)
    assert apart <= packed.stat().st_size < apart + 64 * len(bagel.state_dict())
    for module, file in ((autoencoder, TINY / "ae.safetensors"), (bagel, TINY / "ema.safetensors")):
        for name, tensor in module.state_dict().items():
            assert mapping(tensor.data_ptr())[5] == str(packed if "qkv_proj" in name else file), name


def test_a_sharded_checkpoint_is_packed_alike(tmp_path: Path) -> None:
    tiny_checkpoint.write(tmp_path / "one", TinyConfig())
    tiny_checkpoint.write(tmp_path / "many", TinyConfig(shards=5))
    one, many = (
        Checkpoint(tmp_path / name).load_bagel(CPU, torch.bfloat16, WeightStore(name, tmp_path)).state_dict()
        for name in ("one", "many")
    )
    assert all(torch.equal(one[name], many[name]) for name in one)


def test_all_in_one_process_needs_no_file(prefix: str) -> None:
    config = DeployConfig(checkpoint=str(TINY), shm_prefix=prefix, device="cpu", dtype="float32")
    stages = LocalStages(config)
    assert list(SHM_DIRECTORY.glob(f"{prefix}*")) == []
    stages.close()


def test_weights_are_aligned_as_private_ones_are(tmp_path: Path) -> None:
    assert all(tensor.data_ptr() % 64 == 0 for tensor in _converted(tmp_path).values())


def test_writing_to_a_weight_ends_the_writer_and_changes_nothing(tmp_path: Path) -> None:
    mine = _converted(tmp_path)
    process = FORKSERVER.Process(target=overwrite, args=(tmp_path, "test"))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGSEGV
    _check(mine)
    _check(_converted(tmp_path))


@pytest.mark.parametrize("at", ["a", "c", "e"])
def test_a_writer_killed_in_the_middle_leaves_nothing_that_others_trust(start: Start, tmp_path: Path, at: str) -> None:
    pipe, process = start(convert, tmp_path, "test", at)
    assert [pipe.recv(), pipe.recv()] == ["started", "converting"]
    process.kill()
    process.join()
    assert [path.stat().st_size for path in tmp_path.iterdir()] == [0]  # the lock file
    _check(_converted(tmp_path))
    (name,) = _names(tmp_path)
    assert re.fullmatch(r"test_weights_[0-9a-f]{16}", name)


def test_others_wait_for_the_one_that_converts(start: Start, tmp_path: Path) -> None:
    first, _ = start(convert, tmp_path, "test", "c")
    assert [first.recv(), first.recv()] == ["started", "converting"]
    others = [start(convert, tmp_path, "test", "a")[0] for _ in range(3)]
    assert [other.recv() for other in others] == ["started"] * 3
    assert not any(other.poll(0.5) for other in others)
    first.send("go on")
    # An other that converted would say so, as it comes to "a".
    assert [pipe.recv() for pipe in (first, *others)] == ["converted"] * 4
    assert len(_names(tmp_path)) == 1
    _check(_converted(tmp_path))


def test_one_that_waits_takes_over_from_one_that_is_killed(start: Start, tmp_path: Path) -> None:
    first, process = start(convert, tmp_path, "test", "c")
    assert [first.recv(), first.recv()] == ["started", "converting"]
    second, _ = start(convert, tmp_path, "test", "b")
    assert second.recv() == "started"
    assert not second.poll(0.5)
    process.kill()
    assert second.recv() == "converting"
    second.send("go on")
    assert second.recv() == "converted"
    _check(_converted(tmp_path))


def test_no_room_is_one_clear_error_and_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "posix_fallocate", full)
        with pytest.raises(
            MemoryError, match=r"weights: .* has no room for \d+ bytes \(No space left on device\): raise --shm-size"
        ):
            _converted(tmp_path)
    assert _names(tmp_path) == []
    _check(_converted(tmp_path))


def test_each_dtype_and_each_state_of_a_checkpoint_has_a_file_of_its_own(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    copy = Path(shutil.copytree(TINY, tmp_path / "copy"))
    held = [_converted(shared), _converted(shared, torch.float64)]
    _check(held[1], torch.float64)
    for checkpoint in (TINY, copy):
        held.append(Checkpoint(checkpoint).load_bagel(CPU, torch.float32, WeightStore("test", shared)).state_dict())
    assert len(_names(shared)) == 4
    os.utime(copy / "ema.safetensors", ns=(1, 1))
    held.append(Checkpoint(copy).load_bagel(CPU, torch.float32, WeightStore("test", shared)).state_dict())
    assert len(_names(shared)) == 5


def test_files_no_longer_in_use_go_when_a_new_one_comes(tmp_path: Path) -> None:
    in_use = _converted(tmp_path)
    _converted(tmp_path, torch.float64)
    _converted(tmp_path, prefix="test_2")
    _converted(tmp_path, prefix="other")
    before = set(_names(tmp_path))
    assert len(before) == 4
    _converted(tmp_path, torch.float16)
    gone = before - set(_names(tmp_path))
    assert len(gone) == 1
    assert len(_names(tmp_path)) == 4
    _check(in_use)


def test_the_sweep_of_a_dead_server_spares_them_and_their_own_servers_end_does_not(tmp_path: Path) -> None:
    with SharedMemoryPrefix(tmp_path) as shared:
        _converted(tmp_path, prefix=shared.prefix)
        names = _names(tmp_path)
        assert len(names) == 2
        assert sweep_leftovers(tmp_path) == []
        assert _names(tmp_path) == names
    assert _names(tmp_path) == []
