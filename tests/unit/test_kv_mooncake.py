"""The mooncake connector over an engine that copies within this process."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
import torch

from bagel_triton.kv.block_pool import KVSequence
from bagel_triton.kv.connectors.mooncake import MooncakeConsumer, MooncakeProducer, Piece, TransferEngine
from bagel_triton.protocol.errors import LeaseError
from bagel_triton.protocol.messages import Branch, KVHandle
from tests.support.kv import GEOMETRY, append, claim, contents_of

BFLOAT16 = msgspec.structs.replace(GEOMETRY, dtype="bfloat16", kv_heads=2)


class Wire(TransferEngine):
    """Memory that was registered, and no other, is read and written, by ``memmove``."""

    def __init__(self, network: dict[int, int], unregistered: bool = True) -> None:
        self.peer = "here:1"
        self.network, self._unregistered = network, unregistered
        self.own: set[int] = set()
        self.written: list[Piece] = []

    @property
    def reads_unregistered_memory(self) -> bool:
        return self._unregistered

    def register(self, address: int, size: int) -> None:
        self.network[address] = size
        self.own.add(address)

    def unregister(self, address: int) -> None:
        del self.network[address]
        self.own.remove(address)

    def read(self, peer: str, pieces: Sequence[Piece]) -> None:
        self._check(peer, pieces)
        for local, remote, size in pieces:
            ctypes.memmove(local, remote, size)

    def write(self, peer: str, pieces: Sequence[Piece]) -> None:
        self._check(peer, pieces)
        for local, remote, size in pieces:
            ctypes.memmove(remote, local, size)
        self.written.extend(pieces)

    def _check(self, peer: str, pieces: Sequence[Piece]) -> None:
        for local, remote, size in pieces:
            if peer != self.peer or not self._holds(remote, size):
                raise LeaseError(f"the pool at {peer} cannot be read")
            assert self._unregistered or self._holds(local, size), "the network card cannot reach this memory"

    def _holds(self, address: int, size: int) -> bool:
        return any(start <= address and address + size <= start + length for start, length in self.network.items())


@pytest.fixture
def network() -> dict[int, int]:
    return {}


def _lend(producer: MooncakeProducer, labels: range, ttl_s: float = 60.0) -> KVHandle:
    context = KVSequence(producer.pool)
    append(producer.pool, context, labels)
    return producer.leases.publish("r", Branch.GEN, context, ttl_s)


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("geometry", [GEOMETRY, BFLOAT16], ids=lambda geometry: geometry.dtype)
def test_scattered_contexts_of_any_size_arrive_whole(network: dict[int, int], geometry: Any, in_place: bool) -> None:
    producer = MooncakeProducer(geometry, 12, "test", Wire(network))
    consumer = MooncakeConsumer(Wire(network, unregistered=in_place))
    apart = [_lend(producer, range(5)) for _ in range(3)]
    consumer.release(apart[1])
    producer.leases.reclaim()
    lent = {labels: _lend(producer, labels) for labels in (range(10, 11), range(20, 41), range(50, 54))}
    assert lent[range(20, 41)].blocks == (3, 6, 7, 8, 9, 10)  # around the context that is still lent
    for labels, handle in lent.items():
        expected = contents_of(labels, geometry).to(getattr(torch, geometry.dtype))
        assert torch.equal(claim(consumer, handle), expected)
    assert producer.leases.reclaim() == 3


def test_a_consumer_writes_only_the_words_that_are_its_own(network: dict[int, int]) -> None:
    producer, wire = MooncakeProducer(GEOMETRY, 8, "test", Wire(network)), Wire(network)
    consumer = MooncakeConsumer(wire)
    handle = _lend(producer, range(6))
    consumer.renew(handle)
    claim(consumer, handle)
    address = handle.address
    assert address is not None
    row = address.words + (1 + handle.slot) * 32
    assert {(remote - row, size) for _, remote, size in wire.written} == {(8, 16)}
    assert producer.leases.reclaim() == 1


def test_a_closed_producer_and_consumer_leave_nothing_registered(network: dict[int, int]) -> None:
    producer, wire = MooncakeProducer(GEOMETRY, 8, "test", Wire(network)), Wire(network, unregistered=False)
    consumer = MooncakeConsumer(wire)
    first, second = _lend(producer, range(6)), _lend(producer, range(6))
    claim(consumer, first)
    assert wire.own
    producer.close()
    producer.close()
    with pytest.raises(LeaseError, match="cannot be read"):
        claim(consumer, second)
    consumer.release(second)
    consumer.close()
    assert network == {}


def test_a_lease_of_another_connector_is_refused(network: dict[int, int]) -> None:
    producer = MooncakeProducer(GEOMETRY, 8, "test", Wire(network))
    handle = _lend(producer, range(6))
    strange = msgspec.structs.replace(handle, connector="shm", address=None)
    with pytest.raises(LeaseError, match="is of connector shm; this stage has mooncake"):
        claim(MooncakeConsumer(Wire(network)), strange)


def test_blocks_outside_the_arena_are_refused_before_anything_is_read(network: dict[int, int]) -> None:
    producer = MooncakeProducer(GEOMETRY, 8, "test", Wire(network))
    handle = _lend(producer, range(6))
    with pytest.raises(LeaseError, match=r"names blocks \(0, 8\)"):
        claim(MooncakeConsumer(Wire(network)), msgspec.structs.replace(handle, blocks=(0, 8)))
    assert producer.leases.reclaim() == 1
