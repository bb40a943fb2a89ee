"""One copy of the weights on a device, with files in place of its memory: one load, whichever process dies."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from pathlib import Path

import pytest
import torch

from bagel_triton.ipc.shm import SHM_DIRECTORY
from bagel_triton.weights.checkpoint import Checkpoint
from bagel_triton.weights.sharing import DeviceWeights, WeightStore, shared_weights
from bagel_triton.weights.tiny import checkpoint as tiny_checkpoint
from bagel_triton.weights.tiny.config import TinyConfig
from tests.support.kv_process import Peer, peer
from tests.support.leaks import NO_LEAKS, Leaks
from tests.support.memfd_memory import MemfdMemory
from tests.support.waiting import soon
from tests.support.weight_holder import Counted, CountedWeights, WeightHolder, mapped_file
from tests.support.weights import CPU, FILES, TINY, sources

DEVICE = MemfdMemory()
TENSORS = len(Checkpoint(TINY).load_bagel(torch.device("meta"), torch.float32).state_dict())


@pytest.fixture
def prefix() -> Iterator[str]:
    """A server's; nothing may be left of it in shared memory."""
    name = f"bagel_triton_test_{os.getpid()}_{secrets.token_hex(4)}"
    yield name
    assert list(SHM_DIRECTORY.glob(f"{name}*")) == []


def stage(prefix: str, memory: MemfdMemory = DEVICE, checkpoint: Path = TINY) -> AbstractContextManager[Peer]:
    """A process that has yet to load the transformer."""
    return peer(WeightHolder, partial(memory.weights, prefix), checkpoint)


# --- between processes ---


def test_a_second_process_maps_what_the_first_has_loaded(prefix: str) -> None:
    with stage(prefix) as first, stage(prefix) as second:
        assert first.ask("load") == TENSORS
        assert second.ask("load") == 0
        assert first.ask("files") == second.ask("files")
        assert len(second.ask("files")) == 1
        assert first.ask("differing") == second.ask("differing") == []


def test_after_a_death_the_other_processes_go_on_and_share(prefix: str) -> None:
    with stage(prefix) as first, stage(prefix) as second, stage(prefix) as third:
        assert first.ask("load") == TENSORS
        assert second.ask("load") == 0
        files = second.ask("files")
        first.kill()
        assert second.ask("differing") == []
        assert third.ask("load") == 0
        second.kill()
        with stage(prefix) as first_again:
            assert first_again.ask("load") == 0
            assert first_again.ask("files") == third.ask("files") == files
            assert first_again.ask("differing") == third.ask("differing") == []


def test_a_stage_that_ends_in_good_order_takes_nothing_along(prefix: str) -> None:
    with stage(prefix) as second:
        with stage(prefix) as first:
            assert first.ask("load") == TENSORS
            assert second.ask("load") == 0
        with stage(prefix) as first_again:
            assert first_again.ask("load") == 0
            assert second.ask("differing") == []


def test_processes_that_start_at_once_load_once(prefix: str) -> None:
    with ExitStack() as running:
        stages = [running.enter_context(stage(prefix)) for _ in range(4)]
        for one in stages:
            one.tell("load")
        assert sorted(one.answer() for one in stages) == [0, 0, 0, TENSORS]
        assert len(set.union(*(one.ask("files") for one in stages))) == 1
        assert all(one.ask("differing") == [] for one in stages)


@pytest.mark.parametrize("killed", [False, True], ids=["complete", "killed"])
def test_one_that_waits_is_given_complete_weights_or_loads_them(prefix: str, tmp_path: Path, killed: bool) -> None:
    gate = tmp_path / "gate"
    with stage(prefix, MemfdMemory(gate=gate)) as first, stage(prefix) as second:
        first.tell("load")
        assert soon(gate.exists)
        second.tell("load")
        assert second.silent(0.3)
        if killed:
            first.kill()
        else:
            gate.unlink()
            assert first.answer() == TENSORS
        assert second.answer() == (TENSORS if killed else 0)
        assert second.ask("differing") == []


def test_a_load_that_fails_is_its_processs_own_error(prefix: str) -> None:
    with stage(prefix, MemfdMemory(full=True)) as first, stage(prefix) as second:
        assert first.ask("load") == "MemoryError: the device is full"
        assert second.ask("load") == TENSORS
        assert first.ask("load") == 0


# --- in one process ---


@pytest.fixture
def weights(prefix: str) -> Iterator[DeviceWeights]:
    made = MemfdMemory().weights(prefix)
    yield made
    made.close()


def loaded(weights: DeviceWeights, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return weights.converted(sources(), dtype, FILES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_equal_private_ones(weights: DeviceWeights, dtype: torch.dtype) -> None:
    found, expected = loaded(weights, dtype), sources()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name].to(dtype)) for name in expected)
    assert all(tensor.data_ptr() % 64 == 0 for tensor in found.values())


def test_loading_again_reads_nothing(weights: DeviceWeights) -> None:
    first, again = loaded(weights), Counted(sources())
    second = weights.converted(again, torch.float32, FILES)
    assert again.reads == 0
    assert mapped_file(first["a"]) == mapped_file(second["a"])


def test_tensors_outlive_the_giving(prefix: str) -> None:
    weights = MemfdMemory().weights(prefix)
    held = loaded(weights)
    weights.close()
    assert torch.equal(held["d"], sources()["d"].float())
    later = MemfdMemory().weights(prefix)
    read = Counted(sources())
    later.converted(read, torch.float32, FILES)
    assert read.reads == len(read)
    later.close()


def test_closing_leaves_neither_threads_nor_descriptors_nor_memory(prefix: str) -> None:
    def mapped() -> int:
        return Path("/proc/self/maps").read_text().count("memfd:weights")

    leaks, before = Leaks(), mapped()
    for broken in (MemfdMemory(), MemfdMemory(no_export=True), MemfdMemory(no_import=True)):
        weights = broken.weights(prefix)
        held = [loaded(weights, dtype) for dtype in (torch.float32, torch.bfloat16, torch.float32)]
        weights.close()
        weights.close()
        del held
        assert (leaks.found(), mapped()) == (NO_LEAKS, before)
    full = MemfdMemory(full=True).weights(prefix)
    with pytest.raises(MemoryError, match="the device is full"):
        loaded(full)
    assert (leaks.found(), mapped()) == (NO_LEAKS, before)


def test_a_source_that_cannot_be_read_is_the_error_and_leaves_nothing(weights: DeviceWeights) -> None:
    class Broken(Counted):
        def __getitem__(self, name: str) -> torch.Tensor:
            raise OSError("the disk has gone")

    with pytest.raises(OSError, match="the disk has gone"):
        weights.converted(Broken(sources()), torch.float32, FILES)
    assert loaded(weights).keys() == sources().keys()


@pytest.mark.parametrize(
    ("memory", "reason"),
    [
        (MemfdMemory(no_export=True), "it cannot be exported"),
        (MemfdMemory(no_import=True), "it cannot be imported"),
    ],
)
def test_where_memory_cannot_be_shared_each_has_its_own_and_says_why(
    prefix: str, memory: MemfdMemory, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    weights, others = memory.weights(prefix), MemfdMemory().weights(prefix)
    theirs = loaded(others) if memory.no_import else {}
    held = loaded(weights)
    assert all(torch.equal(held[name], tensor.float()) for name, tensor in sources().items())
    assert f"this process has its own copy of the weights on cpu: {reason}" in caplog.messages
    assert not theirs or held["a"].data_ptr() != theirs["a"].data_ptr()
    weights.close()
    others.close()


def test_checkpoints_dtypes_devices_and_servers_do_not_meet(prefix: str, tmp_path: Path) -> None:
    tiny_checkpoint.write(tmp_path / "other", TinyConfig(seed=5))
    changed = Path(shutil.copytree(tmp_path / "other", tmp_path / "changed"))
    os.utime(changed / "ema.safetensors", ns=(1, 1))
    with ExitStack() as held:

        def load(checkpoint: Path, dtype: torch.dtype, memory: MemfdMemory = DEVICE, server: str = prefix) -> bool:
            """Whether the weights had to be loaded; they are the right ones, and held from now on."""
            weights = CountedWeights(memory.weights(server))
            held.callback(weights.close)
            shared = Checkpoint(checkpoint).load_bagel(CPU, dtype, weights).state_dict()
            private = Checkpoint(checkpoint).load_bagel(CPU, dtype).state_dict()
            assert all(torch.equal(shared[name], tensor) for name, tensor in private.items())
            return weights.reads > 0

        assert load(TINY, torch.float32)
        assert load(tmp_path / "other", torch.float32)
        assert load(changed, torch.float32)
        assert load(TINY, torch.bfloat16)
        assert load(TINY, torch.float32, MemfdMemory("another device"))
        assert load(TINY, torch.float32, server=f"{prefix}_other")
        assert not load(TINY, torch.float32)
        os.utime(changed / "ema.safetensors", ns=(2, 2))
        assert load(changed, torch.float32)


# --- the choice ---


def test_a_cpu_has_files_and_a_gpu_its_memory() -> None:
    assert isinstance(shared_weights("test", CPU), WeightStore)
    on_gpu = shared_weights("test", torch.device("cuda:1"))  # opens nothing yet
    assert isinstance(on_gpu, DeviceWeights)
    assert on_gpu.device == torch.device("cuda:1")
    on_gpu.close()


def test_weights_of_another_device_are_refused() -> None:
    with pytest.raises(ValueError, match="device=meta: the shared weights are on cpu"):
        Checkpoint(TINY).load_bagel(torch.device("meta"), torch.float32, WeightStore("test"))
