"""Leases at their edges, between processes: whatever ends or dies, contexts are intact or refused."""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Iterator

import pytest
import torch

from bagel_triton.kv.connectors.base import Consumer
from bagel_triton.protocol.errors import LeaseError
from bagel_triton.protocol.messages import KVHandle, decode, encode
from tests.support.connectors import Ends, mooncake_master, require_mooncake
from tests.support.kv import claim, contents_of
from tests.support.kv_process import Peer, peer


@pytest.fixture(scope="module")
def master(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with mooncake_master(tmp_path_factory.mktemp("mooncake") / "master.log") as address:
        yield address


# Mooncake's processes take seconds to start, at every edge anew.
@pytest.fixture(
    params=["shm", *(pytest.param(name, marks=pytest.mark.long) for name in ("mooncake", "mooncake_store"))]
)
def ends(request: pytest.FixtureRequest) -> Iterator[Ends]:
    if request.param == "mooncake":
        require_mooncake()
    master = request.getfixturevalue("master") if request.param == "mooncake_store" else ""
    prefix = f"bagel_triton_test_{os.getpid()}_{secrets.token_hex(4)}"
    made = Ends(request.param, prefix, master=master)
    yield made
    for path in made.files():
        path.unlink()


@pytest.fixture
def producer(ends: Ends) -> Iterator[Peer]:
    with peer(ends.producer) as running:
        yield running


@pytest.fixture
def consumer(ends: Ends) -> Iterator[Consumer]:
    with contextlib.closing(ends.consumer()) as made:
        yield made


def test_contexts_travel_between_processes(producer: Peer, consumer: Consumer) -> None:
    handles = [producer.lend(labels) for labels in (range(3), range(10, 25), range(20, 21))]
    for handle, labels in zip(handles, (range(3), range(10, 25), range(20, 21)), strict=True):
        assert torch.equal(claim(consumer, handle), contents_of(labels))
    assert producer.ask("reclaim") == 3
    assert producer.ask("used") == 0


def test_a_fork_is_lent_with_its_shared_past(producer: Peer, consumer: Consumer) -> None:
    handle = decode(producer.ask("fork", range(6), range(50, 57)), KVHandle)
    assert torch.equal(claim(consumer, handle), contents_of([*range(6), *range(50, 57)]))
    producer.ask("reclaim")
    assert producer.ask("used") == 2  # the parent's


def test_a_second_release_does_nothing_even_to_the_slots_next_lease(producer: Peer, consumer: Consumer) -> None:
    old = producer.lend(range(6))
    consumer.release(old)
    consumer.release(old)
    assert producer.ask("reclaim") == 1
    new = producer.lend(range(50, 56))
    assert new.slot == old.slot
    consumer.release(old)
    assert producer.ask("reclaim") == 0
    assert torch.equal(claim(consumer, new), contents_of(range(50, 56)))


def test_a_release_after_expiry_does_nothing(producer: Peer, consumer: Consumer) -> None:
    handle = producer.lend(range(6), ttl_s=0.01)
    time.sleep(0.02)
    assert producer.ask("reclaim") == 1
    consumer.release(handle)
    new = producer.lend(range(50, 56))
    assert producer.ask("reclaim") == 0
    with pytest.raises(LeaseError, match="lease 1 of request r, branch gen has ended"):
        claim(consumer, handle)
    assert torch.equal(claim(consumer, new), contents_of(range(50, 56)))


def test_a_claim_after_a_release_is_refused(producer: Peer, consumer: Consumer) -> None:
    handle = producer.lend(range(6))
    consumer.release(handle)
    with pytest.raises(LeaseError, match="released before"):
        claim(consumer, handle)
    producer.ask("reclaim")
    with pytest.raises(LeaseError, match="has ended"):
        claim(consumer, handle)


def test_a_renewed_lease_does_not_expire(producer: Peer, consumer: Consumer) -> None:
    handle = producer.lend(range(6), ttl_s=0.5)
    for _ in range(3):
        time.sleep(0.3)
        consumer.renew(handle)
        assert producer.ask("reclaim") == 0
    assert torch.equal(claim(consumer, handle), contents_of(range(6)))


def test_a_producer_that_was_restarted_lends_anew_and_refuses_what_was_lent_before(
    ends: Ends, producer: Peer, consumer: Consumer
) -> None:
    seen, unseen = producer.lend(range(3)), producer.lend(range(5))
    assert torch.equal(claim(consumer, seen), contents_of(range(3)))
    producer.ask("close")
    with peer(ends.producer) as successor:
        with pytest.raises(
            LeaseError, match=r"is of generation \d+; the pool's is 0|cannot be read: its stage has ended|has ended or"
        ):
            claim(consumer, unseen)
        consumer.release(unseen)
        handle = successor.lend(range(30, 36))
        assert handle.generation != unseen.generation
        assert torch.equal(claim(consumer, handle), contents_of(range(30, 36)))
        with pytest.raises(LeaseError):
            claim(consumer, unseen)


def test_a_producer_that_was_killed_leaves_no_reader_hanging(ends: Ends, producer: Peer, consumer: Consumer) -> None:
    first, second = producer.lend(range(6)), producer.lend(range(10, 16))
    taken = claim(consumer, first)
    producer.kill()
    assert torch.equal(taken, contents_of(range(6)))
    started = time.monotonic()
    if ends.name == "shm":  # what is mapped survives, and nobody writes to it any more
        assert torch.equal(claim(consumer, second), contents_of(range(10, 16)))
    else:
        with pytest.raises(LeaseError, match="cannot be read: its stage has ended"):
            claim(consumer, second)
        consumer.release(second)
        consumer.renew(second)
    assert time.monotonic() - started < 5.0
    with peer(ends.producer) as successor:
        handle = successor.lend(range(20, 26))
        assert torch.equal(claim(consumer, handle), contents_of(range(20, 26)))
        with pytest.raises(LeaseError):
            claim(consumer, second)


def test_a_consumer_that_was_killed_holds_nothing_past_the_leases_time(ends: Ends, producer: Peer) -> None:
    handle = producer.lend(range(6), ttl_s=0.5)
    with peer(ends.consumer) as victim, pytest.raises(EOFError):
        victim.ask("stop_inside", encode(handle))
    time.sleep(0.5)
    assert producer.ask("reclaim") == 1
    assert producer.ask("used") == 0
    with contextlib.closing(ends.consumer()) as other:
        assert torch.equal(claim(other, producer.lend(range(8))), contents_of(range(8)))
