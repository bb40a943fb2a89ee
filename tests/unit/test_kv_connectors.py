"""Connectors: one contract, in one process and between two, and nothing left in shared memory."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import msgspec
import pytest
import torch

from bagel_triton.kv.block_pool import KVSequence
from bagel_triton.kv.connectors import shm
from bagel_triton.kv.connectors.base import Consumer, Producer
from bagel_triton.kv.connectors.local import LocalConsumer, LocalProducer
from bagel_triton.kv.connectors.shm import ShmConsumer, ShmProducer
from bagel_triton.protocol.errors import LeaseError
from bagel_triton.protocol.messages import Branch, KVGeometry, KVHandle, decode
from tests.support.forkserver import FORKSERVER
from tests.support.kv import GEOMETRY, append, claim, contents_of
from tests.support.shm_producer import produce

Pair = Callable[[KVGeometry], tuple[Producer, Consumer]]
BFLOAT16 = msgspec.structs.replace(GEOMETRY, dtype="bfloat16", kv_heads=2)


@pytest.fixture
def shm_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(shm, "SHM_DIRECTORY", tmp_path)
    return tmp_path


@pytest.fixture(params=["local", "shm"])
def pair(request: pytest.FixtureRequest, shm_directory: Path) -> Pair:
    def make(geometry: KVGeometry) -> tuple[Producer, Consumer]:
        if request.param == "local":
            return LocalProducer(geometry, 8, torch.device("cpu")), LocalConsumer()
        return ShmProducer(geometry, 8, "test"), ShmConsumer()

    return make


def _lend(producer: Producer, labels: range) -> KVHandle:
    context = KVSequence(producer.pool)
    append(producer.pool, context, labels)
    return producer.leases.publish("r", Branch.GEN, context, 60.0)


@pytest.mark.parametrize("geometry", [GEOMETRY, BFLOAT16], ids=lambda geometry: geometry.dtype)
def test_what_is_lent_is_what_is_read(pair: Pair, geometry: KVGeometry) -> None:
    producer, consumer = pair(geometry)
    assert producer.pool.capacity == 8 * geometry.block_tokens
    handles = [_lend(producer, labels) for labels in (range(3), range(10, 16), range(20, 21))]
    for handle, labels in zip(handles, (range(3), range(10, 16), range(20, 21)), strict=True):
        expected = contents_of(labels, geometry).to(getattr(torch, geometry.dtype))
        assert torch.equal(claim(consumer, handle), expected)
    assert producer.leases.reclaim() == 3
    producer.close()
    consumer.close()


def test_a_claim_is_a_copy(pair: Pair) -> None:
    producer, consumer = pair(GEOMETRY)
    taken = claim(consumer, _lend(producer, range(6)))
    producer.leases.reclaim()
    _lend(producer, range(50, 56))
    assert torch.equal(taken, contents_of(range(6)))
    producer.close()


def test_a_consumer_finds_a_closed_producer_gone(pair: Pair) -> None:
    producer, consumer = pair(GEOMETRY)
    first, second = _lend(producer, range(3)), _lend(producer, range(3))
    claim(consumer, first)
    producer.close()
    for reader in (consumer, type(consumer)()):
        with pytest.raises(LeaseError, match="of request r"):
            claim(reader, second)


def test_a_consumer_follows_a_producer_that_was_replaced(pair: Pair) -> None:
    producer, consumer = pair(GEOMETRY)
    claim(consumer, _lend(producer, range(3)))
    producer.close()
    successor, _ = pair(GEOMETRY)
    assert torch.equal(claim(consumer, _lend(successor, range(30, 36))), contents_of(range(30, 36)))
    successor.close()


def test_shm_files_are_private_and_go_with_the_producer(shm_directory: Path) -> None:
    producer = ShmProducer(GEOMETRY, 8, "test")
    files = sorted(shm_directory.iterdir())
    assert [path.name.startswith("test_kv_") for path in files] == [True, True]
    assert {path.stat().st_mode & 0o777 for path in files} == {0o600}
    producer.close()
    assert list(shm_directory.iterdir()) == []


def test_shm_leftovers_of_the_same_prefix_are_removed_at_start(shm_directory: Path) -> None:
    for name in ("test_kv_1", "test_kv_1_leases", "test_2_kv_1", "other_kv_1"):
        (shm_directory / name).write_bytes(b"left")
    ShmProducer(GEOMETRY, 8, "test").close()
    assert {path.name for path in shm_directory.iterdir()} == {"test_2_kv_1", "other_kv_1"}


@pytest.mark.parametrize("full_at", [1, 2])
def test_shm_too_small_is_one_clear_error_and_leaves_no_file(
    shm_directory: Path, monkeypatch: pytest.MonkeyPatch, full_at: int
) -> None:
    calls = []

    def fallocate(descriptor: int, offset: int, size: int) -> None:
        calls.append(size)
        if len(calls) == full_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", fallocate)
    with pytest.raises(MemoryError, match=r"has no room for \d+ bytes \(No space left on device\): raise --shm-size"):
        ShmProducer(GEOMETRY, 8, "test")
    assert list(shm_directory.iterdir()) == []


@pytest.fixture
def other_process() -> Iterator[tuple[Connection, str]]:
    """A producer's process and the prefix of its files, which are in the real shared memory."""
    prefix = f"bagel_triton_test_{os.getpid()}_{secrets.token_hex(4)}"
    pipe, theirs = FORKSERVER.Pipe()
    process = FORKSERVER.Process(target=produce, args=(theirs, prefix, GEOMETRY))
    process.start()
    theirs.close()
    yield pipe, prefix
    with contextlib.suppress(BrokenPipeError):  # it may have ended already, as a test wanted
        pipe.send("end")
    process.join(30)
    pipe.close()
    for path in shm.SHM_DIRECTORY.glob(f"{prefix}_*"):
        path.unlink()


def _ask(pipe: Connection, command: str) -> object:
    pipe.send(command)
    return pipe.recv()


def _files(prefix: str) -> list[Path]:
    return list(shm.SHM_DIRECTORY.glob(f"{prefix}_*"))


def test_shm_carries_contexts_between_processes(other_process: tuple[Connection, str]) -> None:
    pipe, prefix = other_process
    first, second = (decode(pipe.recv_bytes(), KVHandle) for _ in range(2))
    consumer = ShmConsumer()
    assert torch.equal(claim(consumer, second), contents_of(range(100, 110)))
    assert _ask(pipe, "reclaim") == 1
    with pytest.raises(LeaseError, match="has ended"):
        claim(consumer, second)
    assert torch.equal(claim(consumer, first), contents_of(range(10)))
    assert len(_files(prefix)) == 2
    _ask(pipe, "close")
    assert _files(prefix) == []
    with pytest.raises(LeaseError, match="generation"):
        claim(consumer, first)
    consumer.close()


def test_shm_of_a_producer_that_died_is_swept_by_the_next(other_process: tuple[Connection, str]) -> None:
    pipe, prefix = other_process
    for _ in range(2):
        pipe.recv_bytes()
    pipe.send("die")
    with pytest.raises(EOFError):
        pipe.recv_bytes()
    left = _files(prefix)
    assert len(left) == 2
    successor = ShmProducer(GEOMETRY, 4, prefix)
    assert not set(_files(prefix)) & set(left)
    successor.close()
    assert _files(prefix) == []
