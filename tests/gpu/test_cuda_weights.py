"""One copy of the weights between processes on one GPU, whichever of them dies."""

from __future__ import annotations

import os
import secrets
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import pytest
import torch

from bagel_triton.ipc.cuda_memory import CudaMemory, why_not
from bagel_triton.weights.checkpoint import Checkpoint
from bagel_triton.weights.sharing import shared_weights
from bagel_triton.weights.tiny import checkpoint as tiny_checkpoint
from bagel_triton.weights.tiny.config import TinyConfig
from bench.weight_sharing import measure
from tests.support.kv_process import Peer, peer
from tests.support.weight_holder import WeightHolder
from tests.support.weights import TINY

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA memory needs a CUDA device; there is none here"),
]
GPU = torch.device("cuda:0")
MIB = 1 << 20


@pytest.fixture
def prefix() -> str:
    return f"bagel_triton_test_{os.getpid()}_{secrets.token_hex(4)}"


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose transformer takes some 200 MB in bfloat16."""
    directory = tmp_path_factory.mktemp("checkpoints") / "large"
    config = TinyConfig(hidden_size=1024, layers=4, heads=8, kv_heads=2, intermediate_size=2816, vocab_size=2048)
    tiny_checkpoint.write(directory, config)
    return directory


def stage(prefix: str, checkpoint: Path = TINY, dtype: torch.dtype = torch.bfloat16) -> AbstractContextManager[Peer]:
    """A process that has not loaded the transformer yet."""
    return peer(WeightHolder, partial(shared_weights, prefix, GPU), checkpoint, dtype)


def test_this_gpu_can() -> None:
    assert why_not(GPU) is None


def test_what_one_mapping_writes_another_reads_after_its_end() -> None:
    memory, numbers = CudaMemory(GPU), torch.arange(5_000_000, device=GPU).to(torch.uint8)
    descriptor, contents = memory.allocate(5_000_000)
    contents.copy_(numbers)
    memory.complete()
    del contents
    opened = memory.open(descriptor, 5_000_000)
    os.close(descriptor)
    assert torch.equal(opened, numbers)


def test_memory_returns_with_the_last_tensor_and_descriptor() -> None:
    memory, size = CudaMemory(GPU), 256 * MIB
    free = torch.cuda.mem_get_info(GPU)[0]
    descriptor, contents = memory.allocate(size)
    del contents
    opened = memory.open(descriptor, size)
    assert torch.cuda.mem_get_info(GPU)[0] <= free - size
    os.close(descriptor)
    assert torch.cuda.mem_get_info(GPU)[0] <= free - size
    del opened
    assert torch.cuda.mem_get_info(GPU)[0] > free - size


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_two_processes_hold_one_copy(prefix: str, large: Path, dtype: torch.dtype) -> None:
    state = Checkpoint(large).load_bagel(torch.device("meta"), dtype).state_dict()
    size = sum(tensor.nbytes for tensor in state.values())
    with stage(prefix, large, dtype) as first, stage(prefix, large, dtype) as second:
        _, before = first.ask("used"), second.ask("used")  # by then, both have a CUDA context
        assert first.ask("load") == len(state)
        after_one = first.ask("used")
        assert second.ask("load") == 0
        assert after_one - before > 0.9 * size
        assert second.ask("used") - before < 1.25 * size
        assert first.ask("differing") == second.ask("differing") == []


def test_after_a_kill_the_other_processes_compute_on_and_share(prefix: str, large: Path) -> None:
    with stage(prefix, large) as first, stage(prefix, large) as second:
        assert first.ask("load") > 0
        assert second.ask("load") == 0
        (right,) = second.ask("norms", 1)
        second.tell("norms", 2000)
        first.kill()  # in the middle of that
        assert second.answer() == [right] * 2000
        with stage(prefix, large) as first_again:
            assert first_again.ask("load") == 0
            assert first_again.ask("norms", 1) == [right]
            second.kill()
            assert first_again.ask("differing") == []
            with stage(prefix, large) as second_again:
                assert second_again.ask("load") == 0
                assert second_again.ask("differing") == []


def test_the_memory_of_stages_that_are_gone_returns(prefix: str, large: Path) -> None:
    free = torch.cuda.mem_get_info(GPU)[0]
    with stage(prefix, large) as first, stage(prefix, large) as second:
        first.ask("load")
        second.ask("load")
        first.kill()
        second.kill()
    assert torch.cuda.mem_get_info(GPU)[0] >= free - 64 * MIB


def test_all_stages_together_hold_one_copy(large: Path) -> None:
    assert measure(large, "bfloat16", str(GPU)).copies < 1.25
