"""Any order of growing, forking, lending and ending keeps every context's contents and every block."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from bagel_triton.kv.block_pool import KVCacheFull, KVSequence
from bagel_triton.kv.store import slots_of
from bagel_triton.protocol.errors import LeaseError
from bagel_triton.protocol.messages import Branch, KVHandle
from tests.support.kv import GEOMETRY, Lender, append, claim, contents_of, read

OPERATIONS = 4_000
PICK = st.integers(0, 1000)
REQUESTS = st.integers(0, 3)  # few, so that a request has several leases


@dataclass
class Owned:
    context: KVSequence
    labels: list[int]


@dataclass
class Lent:
    handle: KVHandle
    labels: list[int]
    released: bool = False


class ArenaMachine(RuleBasedStateMachine):
    operations: ClassVar[int] = 0

    def __init__(self) -> None:
        super().__init__()
        self.lender = Lender(1)
        self.labels = itertools.count(1)
        self.owned: list[Owned] = []
        self.lent: list[Lent] = []
        self.ended: list[KVHandle] = []

    @initialize(blocks=st.integers(3, 14))
    def start(self, blocks: int) -> None:
        self.lender = Lender(blocks)

    def _grow(self, owned: Owned, tokens: int) -> None:
        """It succeeds where, and only where, as many blocks are free as it takes, wherever they lie."""
        labels = [next(self.labels) for _ in range(tokens)]
        before = (list(owned.context.blocks), owned.context.tokens, self.lender.pool.blocks.free)
        if self._blocks_needed(owned, tokens) <= self.lender.pool.blocks.free:
            append(self.lender.pool, owned.context, labels)
            owned.labels += labels
        else:
            with pytest.raises(KVCacheFull):
                append(self.lender.pool, owned.context, labels)
            assert (owned.context.blocks, owned.context.tokens, self.lender.pool.blocks.free) == before

    def _blocks_needed(self, owned: Owned, tokens: int) -> int:
        size, blocks = GEOMETRY.block_tokens, owned.context.blocks
        tail_is_shared = len(owned.labels) % size and sum(blocks[-1] in held for held, _ in self._holdings()) > 1
        return -(-(len(owned.labels) + tokens) // size) - len(blocks) + bool(tail_is_shared)

    @rule(tokens=st.integers(0, 9))
    def begin(self, tokens: int) -> None:
        owned = Owned(KVSequence(self.lender.pool), [])
        self._grow(owned, tokens)
        self.owned.append(owned)

    @precondition(lambda self: self.owned)
    @rule(pick=PICK)
    def fork(self, pick: int) -> None:
        owned = self.owned[pick % len(self.owned)]
        self.owned.append(Owned(owned.context.fork(), list(owned.labels)))

    @precondition(lambda self: self.owned)
    @rule(pick=PICK, cut=PICK)
    def fork_within(self, pick: int, cut: int) -> None:
        owned = self.owned[pick % len(self.owned)]
        tokens = cut % (len(owned.labels) + 1)
        self.owned.append(Owned(owned.context.fork_at(tokens, tokens), owned.labels[:tokens]))

    @precondition(lambda self: self.owned)
    @rule(pick=PICK, tokens=st.integers(1, 6))
    def extend(self, pick: int, tokens: int) -> None:
        self._grow(self.owned[pick % len(self.owned)], tokens)

    @precondition(lambda self: self.owned)
    @rule(pick=PICK)
    def free(self, pick: int) -> None:
        self.owned.pop(pick % len(self.owned)).context.free()

    @precondition(lambda self: self.owned)
    @rule(pick=PICK, ttl=st.integers(1, 20), request=REQUESTS)
    def publish(self, pick: int, ttl: int, request: int) -> None:
        owned = self.owned.pop(pick % len(self.owned))
        handle = self.lender.book.publish(f"r{request}", Branch.GEN, owned.context, ttl)
        if handle.lease:
            self.lent.append(Lent(handle, owned.labels))

    @precondition(lambda self: self.lent)
    @rule(pick=PICK)
    def claim(self, pick: int) -> None:
        lent = self.lent[pick % len(self.lent)]
        if lent.released:
            with pytest.raises(LeaseError, match="released before"):
                claim(self.lender, lent.handle)
        else:
            assert torch.equal(claim(self.lender, lent.handle), contents_of(lent.labels))
            lent.released = True

    @precondition(lambda self: self.lent)
    @rule(pick=PICK)
    def give_back(self, pick: int) -> None:
        lent = self.lent[pick % len(self.lent)]
        self.lender.release(lent.handle)
        lent.released = True

    @precondition(lambda self: self.ended)
    @rule(pick=PICK)
    def come_late(self, pick: int) -> None:
        handle = self.ended[pick % len(self.ended)]
        with pytest.raises(LeaseError, match="has ended"):
            claim(self.lender, handle)
        self.lender.release(handle)

    @rule(seconds=st.integers(0, 10))
    def reclaim(self, seconds: int) -> None:
        self.lender.clock.now += seconds
        over = [lent for lent in self.lent if lent.released or lent.handle.expires_at <= self.lender.clock.now]
        assert self.lender.book.reclaim() == len(over)
        self._end(over)

    @precondition(lambda self: self.lent)
    @rule(request=REQUESTS)
    def withdraw(self, request: int) -> None:
        over = [lent for lent in self.lent if lent.handle.request_id == f"r{request}"]
        assert self.lender.book.revoke(f"r{request}") == len(over)
        self._end(over)

    def _end(self, over: list[Lent]) -> None:
        self.lent = [lent for lent in self.lent if lent not in over]
        self.ended += [lent.handle for lent in over]

    @invariant()
    def one_more(self) -> None:
        type(self).operations += 1

    @invariant()
    def contents_are_intact(self) -> None:
        store = self.lender.pool.store
        for owned in self.owned:
            assert torch.equal(read(self.lender.pool, owned.context), contents_of(owned.labels))
        for lent in self.lent:
            slots = slots_of(lent.handle.blocks, lent.handle.tokens, GEOMETRY.block_tokens)
            assert torch.equal(store[:, :, slots], contents_of(lent.labels))

    @invariant()
    def a_block_has_two_holders_only_for_one_past(self) -> None:
        size, holders = GEOMETRY.block_tokens, {}
        for blocks, labels in self._holdings():
            for number, block in enumerate(blocks):
                tokens = labels[: (number + 1) * size]
                other = holders.setdefault(block, tokens)
                shorter = min(len(other), len(tokens))
                assert other[:shorter] == tokens[:shorter]

    @invariant()
    def no_block_is_lost(self) -> None:
        held = {block for blocks, _ in self._holdings() for block in blocks}
        assert self.lender.pool.blocks.used == len(held)
        assert len(self.lender.book) == len(self.lent)

    def _holdings(self) -> list[tuple[list[int], list[int]]]:
        owned = [(owned.context.blocks, owned.labels) for owned in self.owned]
        return owned + [(list(lent.handle.blocks), lent.labels) for lent in self.lent]

    def teardown(self) -> None:
        for owned in self.owned:
            owned.context.free()
        self.lender.close()
        count = self.lender.pool.blocks.count
        assert self.lender.pool.blocks.allocate(count) == list(range(count))


def test_thousands_of_operations_in_any_order() -> None:
    ArenaMachine.operations = 0
    run_state_machine_as_test(
        ArenaMachine,
        settings=settings(
            max_examples=120,
            stateful_step_count=50,
            deadline=None,
            derandomize=True,
            database=None,
            report_multiple_bugs=False,
        ),
    )
    assert ArenaMachine.operations >= OPERATIONS
