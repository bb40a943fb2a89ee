"""Contexts as objects of a store: what a lease becomes, and what is said where the store fails."""

from __future__ import annotations

import ctypes
import importlib
import socket
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch

from bagel_triton.deploy.config import MooncakeStoreConfig
from bagel_triton.kv.block_pool import KVCacheFull, KVSequence
from bagel_triton.kv.connectors import mooncake_store
from bagel_triton.kv.connectors.base import ConnectorUnavailable
from bagel_triton.kv.connectors.mooncake_store import (
    MooncakeStoreConsumer,
    MooncakeStoreProducer,
    ObjectStore,
    StoreLeases,
)
from bagel_triton.kv.store import store_shape
from bagel_triton.protocol.errors import LeaseError
from bagel_triton.protocol.messages import Branch, KVHandle
from tests.support.fake_device import GPU, fake_device
from tests.support.kv import GEOMETRY, Clock, append, claim, contents_of, new_arena

BFLOAT16 = msgspec.structs.replace(GEOMETRY, dtype="bfloat16", kv_heads=2)
DEAD = -900


class Library:
    """Stands for Mooncake's store: one process, objects in a dictionary, ``room`` bytes."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.room = 1 << 20
        self.alive, self.asked = True, 0
        self.started: tuple[Any, ...] = ()
        self.pinned: list[Any] = []

    def MooncakeDistributedStore(self) -> Library:
        return self

    def ReplicateConfig(self) -> Any:
        return SimpleNamespace()

    def setup(self, *arguments: Any) -> int:
        self.started = arguments
        return 0

    def get_hostname(self) -> str:
        return "here:1"

    def register_buffer(self, address: int, size: int) -> int:
        return 0

    def unregister_buffer(self, address: int) -> int:
        return 0

    def _dead(self) -> bool:
        self.asked += 1
        return not self.alive

    def put_from(self, key: str, address: int, size: int, pinned: Any) -> int:
        self.pinned.append(pinned)
        if self._dead():
            return DEAD
        if sum(map(len, self.objects.values())) + size > self.room:
            return -200
        assert key not in self.objects, "keys never repeat"
        self.objects[key] = ctypes.string_at(address, size)
        return 0

    def get_into(self, key: str, address: int, size: int) -> int:
        if self._dead():
            return DEAD
        if key not in self.objects:
            return -704
        found = self.objects[key]
        ctypes.memmove(address, found, min(size, len(found)))
        return len(found)

    def batch_is_exist(self, keys: list[str]) -> list[int]:
        return [DEAD] * len(keys) if self._dead() else [int(key in self.objects) for key in keys]

    def batch_remove(self, keys: list[str], force: bool) -> list[int]:
        assert force
        if self._dead():
            return [DEAD] * len(keys)
        return [0 if self.objects.pop(key, None) is not None else -704 for key in keys]

    def upsert(self, key: str, text: bytes) -> int:
        self.objects[key] = text
        return 0

    def get(self, key: str) -> bytes:
        return self.objects.get(key, b"")

    def close(self) -> None:
        self.objects.clear()


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    made = Library()
    for variable in ("MC_FORCE_TCP", "MC_TCP_PROGRESS_TIMEOUT_SEC", "MC_TCP_STATUS_TIMEOUT_SEC"):
        monkeypatch.setenv(variable, "")  # so that it is as before after the test
    monkeypatch.setattr(importlib, "import_module", lambda name: made)
    return made


@pytest.fixture
def config() -> Iterator[MooncakeStoreConfig]:
    """That of a master which answers."""
    with socket.create_server(("127.0.0.1", 0)) as master:
        yield MooncakeStoreConfig(master=f"127.0.0.1:{master.getsockname()[1]}")


@pytest.fixture
def store(library: Library, config: MooncakeStoreConfig) -> ObjectStore:
    return ObjectStore(config)


def _lend(producer: MooncakeStoreProducer, labels: range, request_id: str = "r") -> KVHandle:
    context = KVSequence(producer.pool)
    append(producer.pool, context, labels)
    return producer.leases.publish(request_id, Branch.GEN, context, 60.0)


@pytest.mark.parametrize("geometry", [GEOMETRY, BFLOAT16], ids=lambda geometry: geometry.dtype)
def test_scattered_contexts_arrive_whole_and_hold_no_block(library: Library, store: ObjectStore, geometry: Any) -> None:
    producer, consumer = MooncakeStoreProducer(geometry, 12, "test", store), MooncakeStoreConsumer(store)
    contexts = [KVSequence(producer.pool) for _ in range(2)]
    for start in range(0, 12, 4):
        for number, context in enumerate(contexts):
            append(producer.pool, context, range(100 * number + start, 100 * number + start + 4))
    handles = [producer.leases.publish("r", Branch.GEN, context, 60.0) for context in contexts]
    assert producer.pool.blocks.used == 0
    assert producer.leases.blocks == 6  # what is admitted besides may not fill the store
    for number, handle in enumerate(handles):
        expected = contents_of(range(100 * number, 100 * number + 12), geometry).to(getattr(torch, geometry.dtype))
        assert torch.equal(claim(consumer, handle), expected)
    assert library.objects == {}
    assert producer.leases.reclaim() == 2
    assert (len(producer.leases), producer.leases.blocks) == (0, 0)


def test_contexts_of_a_gpu_arrive_on_another_hosts_gpu(library: Library, store: ObjectStore) -> None:
    with fake_device() as waits:
        producer, consumer = MooncakeStoreProducer(GEOMETRY, 12, "test", store, GPU), MooncakeStoreConsumer(store)
        assert producer.pool.store.is_cuda
        first, second, third = (KVSequence(producer.pool) for _ in range(3))
        for context, labels in ((first, range(4)), (second, range(9)), (first, range(4, 10)), (third, range(50, 59))):
            append(producer.pool, context, labels)  # the first one's blocks are scattered
        for context, labels in ((first, range(10)), (third, range(50, 59))):
            handle = producer.leases.publish("r", Branch.GEN, context, 60.0)
            destination = torch.zeros(store_shape(GEOMETRY, handle.tokens), device=GPU)
            waits.clear()
            consumer.claim(handle, destination)
            assert waits == ["stream"]  # before the lease is released
            assert torch.equal(destination.cpu(), contents_of(labels))
    assert library.objects == {}


def test_a_cancelled_request_leaves_no_object_of_its_own(library: Library, store: ObjectStore) -> None:
    producer, consumer = MooncakeStoreProducer(GEOMETRY, 8, "test", store), MooncakeStoreConsumer(store)
    gone, kept = _lend(producer, range(6), "leaver"), _lend(producer, range(50, 54), "other")
    consumer.renew(gone)
    assert producer.leases.revoke("leaver") == 1
    assert len(library.objects) == 1
    with pytest.raises(LeaseError, match="lease 1 of request leaver, branch gen has ended"):
        claim(consumer, gone)
    assert torch.equal(claim(consumer, kept), contents_of(range(50, 54)))


def test_only_a_lease_that_is_renewed_outlives_its_time(library: Library, store: ObjectStore) -> None:
    pool, clock, consumer = new_arena(8), Clock(), MooncakeStoreConsumer(store)
    leases = StoreLeases(pool, store, "pool", 7, clock)
    handles = []
    for _ in range(2):
        context = KVSequence(pool)
        append(pool, context, range(6))
        handles.append(leases.publish("r", Branch.GEN, context, 10.0))
    for expected in (1, 0):
        clock.now += 10.0
        consumer.renew(handles[0])
        assert leases.reclaim() == expected
    clock.now += 10.0
    assert leases.reclaim() == 1
    consumer.renew(handles[0])
    assert library.objects == {}


def test_a_context_that_is_deleted_while_it_is_read_is_refused(
    library: Library, store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    producer, consumer = MooncakeStoreProducer(GEOMETRY, 8, "test", store), MooncakeStoreConsumer(store)
    handle, read = _lend(producer, range(6), "leaver"), library.get_into

    def too_late(*arguments: Any) -> int:
        size = read(*arguments)
        producer.leases.revoke("leaver")
        return size

    monkeypatch.setattr(library, "get_into", too_late)
    with pytest.raises(LeaseError, match="has ended"):
        claim(consumer, handle)


def test_an_object_of_another_size_is_refused(library: Library, store: ObjectStore) -> None:
    producer, consumer = MooncakeStoreProducer(GEOMETRY, 8, "test", store), MooncakeStoreConsumer(store)
    handle = _lend(producer, range(6))
    [key] = library.objects
    library.objects[key] = b"short"
    with pytest.raises(LeaseError, match="cannot be read: it has 5 bytes, not 384"):
        claim(consumer, handle)


def test_a_full_store_leaves_the_context_to_its_owner(library: Library, store: ObjectStore) -> None:
    producer = MooncakeStoreProducer(GEOMETRY, 8, "test", store)
    library.room = 100
    with pytest.raises(KVCacheFull, match="Mooncake's store has no room for 384 bytes"):
        _lend(producer, range(6))
    assert producer.pool.blocks.used == 2
    assert len(producer.leases) == 0


def test_contents_of_leases_do_not_make_room_for_others(library: Library, config: MooncakeStoreConfig) -> None:
    producer = MooncakeStoreProducer(GEOMETRY, 8, "test", ObjectStore(config, segment=20 << 20))
    assert library.started[:3] == ("127.0.0.1", "P2PHANDSHAKE", 32 << 20)
    _lend(producer, range(6))
    assert library.pinned[0].with_hard_pin
    assert library.pinned[0].preferred_segment == "here:1"


def test_a_master_that_died_is_not_asked_again_at_once(
    library: Library, store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(mooncake_store.time, "monotonic", lambda: clock.now)
    producer, consumer = MooncakeStoreProducer(GEOMETRY, 8, "test", store), MooncakeStoreConsumer(store)
    handle = _lend(producer, range(6))
    library.alive, library.asked = False, 0
    with pytest.raises(LeaseError, match=r"master at 127.0.0.1:\d+ does not answer"):
        claim(consumer, handle)
    with pytest.raises(LeaseError, match="did not answer a moment ago"):
        claim(consumer, handle)
    consumer.release(handle)
    consumer.renew(handle)
    assert producer.leases.reclaim() == 0
    assert library.asked == 1
    library.alive = True
    clock.now += 5.0
    assert torch.equal(claim(consumer, handle), contents_of(range(6)))


def test_without_a_master_it_does_not_start(library: Library, config: MooncakeStoreConfig) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        nobody = f"127.0.0.1:{closed.getsockname()[1]}"
    with pytest.raises(ConnectorUnavailable, match=f"no mooncake_master answers at {nobody} .*; start it first"):
        ObjectStore(msgspec.structs.replace(config, master=nobody))
