"""The connector's self-test: it passes where contexts travel, and tells where they do not."""

from __future__ import annotations

import contextlib
import itertools
import os
import secrets

import msgspec
import pytest
import torch

from bagel_triton.deploy.config import MIN_BLOCKS
from bagel_triton.kv.block_pool import KVCacheFull
from bagel_triton.kv.connectors import base
from bagel_triton.kv.connectors.local import LocalConsumer, LocalProducer
from bagel_triton.protocol.errors import LeaseError
from bagel_triton.protocol.messages import KVHandle, decode, decode_handle, encode_handle
from tests.support.connectors import Ends, require_mooncake
from tests.support.kv import GEOMETRY
from tests.support.kv_process import peer

CPU = torch.device("cpu")


def test_the_least_pool_of_a_deploy_file_has_room_for_it() -> None:
    assert MIN_BLOCKS == 2 * base.SELFTEST_BLOCKS


@pytest.mark.parametrize("name", ["shm", "mooncake"])
def test_it_passes_between_processes_and_leaves_nothing(name: str) -> None:
    if name == "mooncake":
        require_mooncake()
    ends = Ends(name, f"bagel_triton_test_{os.getpid()}_{secrets.token_hex(4)}")
    with peer(ends.producer) as producer, contextlib.closing(ends.consumer()) as consumer:
        handle = decode(producer.ask("pattern"), KVHandle)
        assert handle.tokens == 15
        assert decode_handle(encode_handle(handle)) == handle
        base.read_pattern(consumer, handle, CPU)
        assert producer.ask("reclaim") == 1
        assert producer.ask("used") == 0
    assert ends.files() == []


@pytest.fixture
def producer() -> LocalProducer:
    return LocalProducer(GEOMETRY, 16, CPU)


def test_its_blocks_are_scattered(producer: LocalProducer) -> None:
    blocks = base.lend_pattern(producer, 60.0).blocks
    assert all(second - first > 1 for first, second in itertools.pairwise(blocks))


def test_one_wrong_number_fails_it(producer: LocalProducer) -> None:
    handle = base.lend_pattern(producer, 60.0)
    slot = handle.blocks[1] * GEOMETRY.block_tokens
    producer.pool.store[1, 1, slot, 0, 2] += 1
    with pytest.raises(LeaseError, match=r"self-test of connector local read 1 of 240 numbers wrong"):
        base.read_pattern(LocalConsumer(), handle, CPU)


def test_two_patterns_differ(producer: LocalProducer) -> None:
    first, second = (base.lend_pattern(producer, 60.0) for _ in range(2))
    exchanged = msgspec.structs.replace(first, slot=second.slot, lease=second.lease, blocks=second.blocks)
    with pytest.raises(LeaseError, match="numbers wrong"):
        base.read_pattern(LocalConsumer(), exchanged, CPU)


def test_a_full_arena_fails_it_and_keeps_no_block(producer: LocalProducer) -> None:
    held = producer.pool.blocks.allocate(14)
    with pytest.raises(KVCacheFull):
        base.lend_pattern(producer, 60.0)
    assert producer.pool.blocks.used == len(held)
