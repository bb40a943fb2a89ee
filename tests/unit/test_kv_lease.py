"""The lease protocol: who may read a context, until when, and what a late reader is told."""

from __future__ import annotations

import pytest
import torch

from bagel_triton.kv import lease as lease_module
from bagel_triton.kv.block_pool import KVCacheFull, KVSequence
from bagel_triton.kv.connectors import base
from bagel_triton.kv.lease import LeaseManager
from bagel_triton.kv.store import store_shape
from bagel_triton.protocol.errors import LeaseError
from bagel_triton.protocol.messages import Branch, KVHandle
from tests.support.kv import GEOMETRY, Lender, claim, contents_of, read


@pytest.fixture
def lender() -> Lender:
    return Lender(blocks=8)


def test_a_claim_reads_the_context_and_gives_its_blocks_back(lender: Lender) -> None:
    handle = lender.lend(range(6))
    assert (handle.tokens, handle.next_position, handle.generation) == (6, 6, 7)
    assert torch.equal(claim(lender, handle), contents_of(range(6)))
    assert lender.pool.blocks.used == 2  # the producer takes them back in its own time
    assert lender.book.reclaim() == 1
    assert lender.pool.blocks.used == 0
    assert len(lender.book) == 0


def test_an_unclaimed_lease_stays(lender: Lender) -> None:
    handle = lender.lend(range(6), ttl_s=10.0)
    lender.clock.now += 9.9
    assert lender.book.reclaim() == 0
    assert torch.equal(claim(lender, handle), contents_of(range(6)))


def test_a_lease_is_claimed_once(lender: Lender) -> None:
    handle = lender.lend(range(6), request_id="r-1")
    claim(lender, handle)
    with pytest.raises(LeaseError, match="lease 1 of request r-1, branch gen was released before"):
        claim(lender, handle)


def test_a_lease_given_back_unread_is_reclaimed_and_unreadable(lender: Lender) -> None:
    handle = lender.lend(range(6))
    lender.release(handle)
    lender.release(handle)
    with pytest.raises(LeaseError, match="released before"):
        claim(lender, handle)
    assert lender.book.reclaim() == 1
    assert lender.book.reclaim() == 0


def test_a_late_release_does_not_end_the_slots_next_lease(lender: Lender) -> None:
    old = lender.lend(range(6))
    lender.release(old)
    lender.book.reclaim()
    new = lender.lend(range(50, 56))
    assert new.slot == old.slot
    lender.release(old)
    assert lender.book.reclaim() == 0
    with pytest.raises(LeaseError, match="has ended"):
        claim(lender, old)
    assert torch.equal(claim(lender, new), contents_of(range(50, 56)))


def test_an_expired_lease_is_reclaimed(lender: Lender) -> None:
    kept = lender.lend(range(50, 54), ttl_s=20.0)
    handle = lender.lend(range(6), ttl_s=10.0)
    lender.clock.now += 10.0
    assert lender.book.reclaim() == 1
    with pytest.raises(LeaseError, match="has ended"):
        claim(lender, handle)
    assert torch.equal(claim(lender, kept), contents_of(range(50, 54)))


def test_a_lease_lasts_until_it_is_taken_back(lender: Lender) -> None:
    handle = lender.lend(range(6), ttl_s=10.0)
    lender.clock.now += 11.0  # expired, but the producer has not looked yet: what it lent is still there
    assert torch.equal(claim(lender, handle), contents_of(range(6)))
    assert lender.book.reclaim() == 1


def test_a_renewed_lease_begins_anew(lender: Lender) -> None:
    handle = lender.lend(range(6), ttl_s=10.0)
    for _ in range(3):
        lender.clock.now += 9.0
        lender.renew(handle)
        assert lender.book.reclaim() == 0
    assert torch.equal(claim(lender, handle), contents_of(range(6)))


def test_a_lease_that_is_no_longer_renewed_expires(lender: Lender) -> None:
    handle = lender.lend(range(6), ttl_s=10.0)
    lender.renew(handle)
    assert lender.book.reclaim() == 0
    lender.clock.now += 10.0
    assert lender.book.reclaim() == 1
    lender.renew(handle)  # too late, and harmless
    with pytest.raises(LeaseError, match="has ended"):
        claim(lender, handle)


def test_a_restarted_producer_refuses_leases_of_the_one_before(lender: Lender) -> None:
    handle = lender.lend(range(6))
    LeaseManager(lender.pool, lender.table, "pool", "test", 8, lender.clock)
    with pytest.raises(LeaseError, match="is of generation 7; the pool's is 8"):
        claim(lender, handle)
    lender.release(handle)  # must not mark a lease of the new generation
    assert lender.table.released(handle.slot) == 0


def test_a_closed_producer_lends_nothing(lender: Lender) -> None:
    handle = lender.lend(range(6))
    lender.close()
    assert lender.pool.blocks.used == 0
    with pytest.raises(LeaseError, match="generation"):
        claim(lender, handle)


def test_a_lease_withdrawn_during_the_copy_shows(lender: Lender, monkeypatch: pytest.MonkeyPatch) -> None:
    handle = lender.lend(range(6), request_id="leaver")
    copy = base.gather

    def copy_too_late(store: torch.Tensor, slots: slice | torch.Tensor, out: torch.Tensor) -> None:
        lender.book.revoke("leaver")
        lender.lend(range(50, 56), request_id="next")
        copy(store, slots, out)

    monkeypatch.setattr(base, "gather", copy_too_late)
    with pytest.raises(LeaseError, match="request leaver, branch gen has ended"):
        claim(lender, handle)
    assert lender.book.reclaim() == 0  # the next request's lease is not touched


def test_withdrawing_a_request_takes_back_its_leases_only(lender: Lender) -> None:
    first = [lender.lend(range(4), request_id="leaver") for _ in range(2)]
    other = lender.lend(range(50, 54), request_id="other")
    assert lender.book.revoke("leaver") == 2
    assert lender.book.revoke("leaver") == 0
    assert lender.pool.blocks.used == 1
    for handle in first:
        with pytest.raises(LeaseError, match="has ended"):
            claim(lender, handle)
    assert torch.equal(claim(lender, other), contents_of(range(50, 54)))


@pytest.mark.parametrize(
    ("shape", "dtype", "shown"),
    [
        (store_shape(GEOMETRY, 5), torch.float32, "float32 [2, 2, 5, 1, 4]"),
        ((3, 2, 6, 1, 4), torch.float32, "float32 [3, 2, 6, 1, 4]"),
        ((2, 2, 6, 2, 2), torch.float32, "float32 [2, 2, 6, 2, 2]"),
        (store_shape(GEOMETRY, 6), torch.bfloat16, "bfloat16 [2, 2, 6, 1, 4]"),
    ],
)
def test_a_reader_of_another_shape_or_precision_is_refused(
    lender: Lender, shape: tuple[int, ...], dtype: torch.dtype, shown: str
) -> None:
    handle = lender.lend(range(6))
    destination = torch.full(shape, -1, dtype=dtype)
    with pytest.raises(LeaseError) as refusal:
        lender.claim(handle, destination)
    assert "is float32 [2, 2, 6, 1, 4]" in refusal.value.message
    assert refusal.value.message.endswith(f"expects {shown}")
    assert bool((destination == -1).all())
    assert lender.book.reclaim() == 1  # nobody else would give it back


def test_an_empty_context_needs_no_lease(lender: Lender) -> None:
    handle = lender.book.publish("r", Branch.CFG_TEXT, KVSequence(lender.pool), 10.0)
    assert (handle.lease, handle.tokens, handle.blocks) == (0, 0, ())
    assert len(lender.book) == 0
    assert claim(lender, handle).shape[2] == 0
    assert claim(lender, handle).shape[2] == 0
    lender.release(handle)


def test_a_full_table_leaves_the_context_to_its_owner(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "SLOTS", 2)
    lender = Lender(blocks=8)
    handles: list[KVHandle] = [lender.lend([label]) for label in (1, 2)]
    assert handles[0].slot != handles[1].slot
    context = lender.context([3])
    with pytest.raises(KVCacheFull, match="all 2 lease slots are taken"):
        lender.book.publish("r", Branch.GEN, context, 10.0)
    assert torch.equal(read(lender.pool, context), contents_of([3]))
    lender.release(handles[0])
    assert lender.book.reclaim() == 1
    again = lender.book.publish("r", Branch.GEN, context, 10.0)
    assert torch.equal(claim(lender, again), contents_of([3]))
    assert torch.equal(claim(lender, handles[1]), contents_of([2]))
