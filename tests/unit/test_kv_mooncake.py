"""The connector ``mooncake``: leases over a transfer engine, and what the engine and its library need."""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch

from bagel_triton.deploy.config import MooncakeConfig
from bagel_triton.kv.block_pool import KVSequence
from bagel_triton.kv.connectors import mooncake
from bagel_triton.kv.connectors.base import ConnectorUnavailable, lend_pattern, read_pattern
from bagel_triton.kv.connectors.mooncake import MooncakeConsumer, MooncakeProducer, Piece, TransferEngine
from bagel_triton.kv.store import store_shape
from bagel_triton.protocol.errors import LeaseError
from bagel_triton.protocol.messages import Branch, KVGeometry, KVHandle
from tests.support.fake_device import GPU, fake_device
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


# --- stages on GPUs ---


@pytest.mark.parametrize("geometry", [GEOMETRY, BFLOAT16], ids=lambda geometry: geometry.dtype)
def test_contexts_of_a_gpu_arrive_on_another_hosts_gpu(network: dict[int, int], geometry: KVGeometry) -> None:
    with fake_device() as waits:
        producer = MooncakeProducer(geometry, 12, "test", Wire(network), GPU)
        consumer = MooncakeConsumer(Wire(network))
        assert producer.pool.store.is_cuda
        apart = [_lend(producer, range(5)) for _ in range(3)]
        consumer.release(apart[1])
        producer.leases.reclaim()
        again = range(20, 41)  # in blocks that another context had, around one that is still lent
        for labels in (range(10, 11), again):
            waits.clear()
            handle = _lend(producer, labels)
            assert waits == ["stream"]  # before the lease is granted
            destination = torch.zeros(store_shape(geometry, handle.tokens), dtype=producer.pool.store.dtype, device=GPU)
            consumer.claim(handle, destination)
            assert waits == ["stream", "stream"]  # before it is released
            assert torch.equal(destination.cpu(), contents_of(labels, geometry).to(destination.dtype))
        assert producer.leases.reclaim() == 2
        read_pattern(consumer, lend_pattern(producer), GPU)
        producer.close()
        consumer.close()
    assert network == {}


# --- the transfer engine itself ---


def _import_error(monkeypatch: pytest.MonkeyPatch, error: ImportError) -> None:
    def fail(name: str) -> ModuleType:
        raise error

    monkeypatch.setattr(importlib, "import_module", fail)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    _import_error(monkeypatch, ModuleNotFoundError("No module named 'mooncake'"))
    with pytest.raises(ConnectorUnavailable, match=r"needs the Python package mooncake-.*bagel-triton\[mooncake\]"):
        TransferEngine(MooncakeConfig())


@pytest.mark.parametrize(
    ("library", "package"),
    [("libibverbs.so.1", "libibverbs1"), ("libnuma.so.1", "libnuma1"), ("libx.so.3", "that brings libx.so.3")],
)
def test_a_missing_system_library_is_named_with_its_package(
    monkeypatch: pytest.MonkeyPatch, library: str, package: str
) -> None:
    _import_error(monkeypatch, ImportError(f"{library}: cannot open shared object file: No such file or directory"))
    with pytest.raises(ConnectorUnavailable) as missing:
        TransferEngine(MooncakeConfig())
    assert f"needs the system library {library}: install the package {package} (" in str(missing.value)


def test_another_error_of_the_library_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    _import_error(monkeypatch, ImportError("undefined symbol: x"))
    with pytest.raises(ImportError, match="undefined symbol"):
        TransferEngine(MooncakeConfig())


class _Library:
    """Stands for the library: records how an engine was started and what it was asked for."""

    def __init__(self, results: Sequence[int] = ()) -> None:
        self.started: tuple[str, ...] = ()
        self.batches: list[int] = []
        self.results = list(results)

    def TransferEngine(self) -> _Library:
        return self

    def initialize(self, *arguments: str) -> int:
        self.started = arguments
        return 0

    def get_rpc_port(self) -> int:
        return 15000

    def batch_transfer_sync_read(self, peer: str, local: list[int], remote: list[int], sizes: list[int]) -> int:
        self.batches.append(len(local))
        return self.results.pop(0) if self.results else 0


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> _Library:
    made = _Library()
    for variable in ("MC_FORCE_TCP", "MC_TCP_PROGRESS_TIMEOUT_SEC", "MC_TCP_STATUS_TIMEOUT_SEC"):
        monkeypatch.setenv(variable, "")  # so that it is as before after the test
    monkeypatch.setattr(importlib, "import_module", lambda name: made)
    return made


def test_many_pieces_go_in_batches_that_the_library_takes(library: _Library) -> None:
    engine = TransferEngine(MooncakeConfig(host="10.0.0.7"))
    assert (engine.peer, library.started) == ("10.0.0.7:15000", ("10.0.0.7", "P2PHANDSHAKE", "tcp", ""))
    engine.read("10.0.0.8:1", [(0, 0, 1)] * 300)
    assert library.batches == [128, 128, 44]


def test_a_peer_that_took_long_to_fail_is_not_asked_again_at_once(
    library: _Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(mooncake.time, "monotonic", lambda: clock.now)

    def slow(*arguments: Any) -> int:
        clock.now += 1.0
        return -1

    engine = TransferEngine(MooncakeConfig(timeout_s=5))
    good = library.batch_transfer_sync_read
    monkeypatch.setattr(library, "batch_transfer_sync_read", slow)
    with pytest.raises(LeaseError, match="cannot be read: its stage has ended"):
        engine.read("dead:1", [(0, 0, 1)])
    monkeypatch.setattr(library, "batch_transfer_sync_read", good)
    with pytest.raises(LeaseError, match="did not answer a moment ago"):
        engine.read("dead:1", [(0, 0, 1)])
    engine.read("other:1", [(0, 0, 1)])
    clock.now += 5.0
    engine.read("dead:1", [(0, 0, 1)])
    assert library.batches == [1, 1]


def test_rdma_without_a_device_is_refused_where_the_library_would_take_tcp(
    library: _Library, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(mooncake, "RDMA_DEVICES", tmp_path / "infiniband")
    with pytest.raises(ConnectorUnavailable, match="protocol='rdma' needs an RDMA device"):
        TransferEngine(MooncakeConfig(protocol="rdma"))
    (tmp_path / "infiniband" / "mlx5_0").mkdir(parents=True)
    with pytest.raises(ConnectorUnavailable, match=r"device_name=\['mlx5_1'\]: the RDMA devices here are mlx5_0"):
        TransferEngine(MooncakeConfig(protocol="rdma", device_name="mlx5_0,mlx5_1"))
    engine = TransferEngine(MooncakeConfig(protocol="rdma", device_name="mlx5_0"))
    assert library.started == ("127.0.0.1", "P2PHANDSHAKE", "rdma", "mlx5_0")
    assert not engine.reads_unregistered_memory
