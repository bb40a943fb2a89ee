"""Leases: the right to read a sequence's KV for a limited time, without a lock between processes.

The lease table has a few int64 words per slot, in memory that both sides map. Only the
producer writes ``granted``, the lease a slot carries (0 for none). Only the consumer writes
``released``, the last lease it gave back, and ``renewals``, a count it raises while it still
wants the lease. When the count moves, the producer restarts the lease's time; no clock is
shared. Each word has one writer and is stored whole, so no lock is needed.

Lease ids never repeat within a generation. A consumer reads ``granted`` before and after its
copy, as a seqlock's reader does, and so notices a lease that was reclaimed meanwhile.
Releasing or renewing a stale lease id does nothing; claiming one raises :class:`LeaseError`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bagel_triton.kv.block_pool import KVCacheFull, KVCachePool, KVSequence
from bagel_triton.protocol.errors import LeaseError
from bagel_triton.protocol.messages import LEASE_SLOTS, Address, Branch, KVHandle

SLOTS = LEASE_SLOTS
_WORDS = 4  # a slot's words; one is spare
_HEADER, _GRANTED, _RELEASED, _RENEWALS = 0, 0, 1, 2
Words = npt.NDArray[np.int64]


def table_words() -> int:
    """Length of a table's array: one header row (the generation) and a row per slot."""
    return _WORDS * (1 + SLOTS)


def row_bytes() -> int:
    """Bytes of a table's row."""
    return _WORDS * 8


def consumer_words() -> tuple[int, int]:
    """Byte range, within a slot's row, of the words that a consumer writes."""
    return _RELEASED * 8, (_RENEWALS + 1) * 8


class LeaseTable:
    """The shared words, [1 + SLOTS, 4]; row 0 holds the producer's generation.

    A subclass whose words are a copy of another host's overrides :meth:`fetch`, called
    before a consumer reads a slot, and :meth:`send`, called after it writes one.
    """

    def __init__(self, words: Words) -> None:
        self._words = words.reshape(1 + SLOTS, _WORDS)

    def fetch(self, slot: int) -> None:
        """Bring the generation and the words of ``slot`` up to date."""

    def send(self, slot: int) -> None:
        """Make writes to ``slot`` visible to the producer."""

    def open(self, generation: int) -> None:
        """Start a generation: no lease is granted."""
        self._words[1:] = 0
        self._words[_HEADER, 0] = generation

    @property
    def generation(self) -> int:
        """The producer's generation; 0 when it has gone."""
        return int(self._words[_HEADER, 0])

    def grant(self, slot: int, lease: int) -> None:
        """Producer: put ``lease`` in ``slot``; 0 ends the lease there."""
        self._words[1 + slot, _GRANTED] = lease

    def granted(self, slot: int) -> int:
        """The lease that ``slot`` carries."""
        return int(self._words[1 + slot, _GRANTED])

    def release(self, slot: int, lease: int) -> None:
        """Consumer: ``lease`` may be reclaimed."""
        self._words[1 + slot, _RELEASED] = lease
        self.send(slot)

    def released(self, slot: int) -> int:
        """The lease that was last released in ``slot``."""
        return int(self._words[1 + slot, _RELEASED])

    def renew(self, slot: int) -> None:
        """Consumer: the lease in ``slot`` is still wanted."""
        self._words[1 + slot, _RENEWALS] += 1
        self.send(slot)

    def renewals(self, slot: int) -> int:
        """The number of renewals of the leases in ``slot``."""
        return int(self._words[1 + slot, _RENEWALS])

    def carries(self, handle: KVHandle) -> bool:
        """Whether the slot still carries the lease of ``handle``, released or not."""
        self.fetch(handle.slot)
        return self.generation == handle.generation and self.granted(handle.slot) == handle.lease

    def check(self, handle: KVHandle) -> None:
        """Raise :class:`LeaseError` unless ``handle`` may be read now."""
        self.fetch(handle.slot)
        what = f"lease {handle.lease} of request {handle.request_id}, branch {handle.branch}"
        if self.generation != handle.generation:
            raise LeaseError(f"{what} is of generation {handle.generation}; the pool's is {self.generation}")
        if self.granted(handle.slot) != handle.lease:
            raise LeaseError(f"{what} has ended")
        if self.released(handle.slot) == handle.lease:
            raise LeaseError(f"{what} was released before")


@dataclass
class _Lease:
    request_id: str
    lease: int
    context: KVSequence
    ttl_s: float
    expires_at: float
    renewals: int


class LeaseManager:
    """The producer's side: grants leases on sequences and frees their blocks when they end.

    ``before_grant`` brings a sequence to where consumers read it, if that is not the pool.

    Not thread-safe: the thread that owns the pool owns it.
    """

    def __init__(
        self,
        pool: KVCachePool,
        table: LeaseTable,
        pool_name: str,
        connector: str,
        generation: int,
        clock: Callable[[], float] = time.monotonic,
        address: Address | None = None,
        before_grant: Callable[[KVSequence], None] | None = None,
    ) -> None:
        self._pool, self._table, self._before_grant = pool, table, before_grant
        self._pool_name, self._connector, self._generation = pool_name, connector, generation
        self._clock, self._address = clock, address
        self._leases: dict[int, _Lease] = {}  # by slot
        self._free_slots = list(range(SLOTS - 1, -1, -1))
        self._last_lease = 0
        table.open(generation)

    def __len__(self) -> int:
        return len(self._leases)

    @property
    def blocks(self) -> int:
        """Blocks that leases hold; one that two leases share counts twice."""
        return sum(len(lease.context.blocks) for lease in self._leases.values())

    def publish(self, request_id: str, branch: Branch, context: KVSequence, ttl_s: float) -> KVHandle:
        """Lend ``context`` for ``ttl_s`` seconds; its blocks belong to the lease from here on.

        An empty sequence needs no lease: its handle has ``lease`` 0.

        Raises:
            KVCacheFull: every lease slot is taken; the caller still owns the sequence.
        """
        slot = lease = 0
        expires_at = self._clock() + ttl_s
        if context.tokens:
            if not self._free_slots:
                raise KVCacheFull(f"all {SLOTS} lease slots are taken")
            if self._before_grant is not None:
                self._before_grant(context)
            slot = self._free_slots.pop()
            self._last_lease = lease = self._last_lease + 1
            self._leases[slot] = _Lease(request_id, lease, context, ttl_s, expires_at, self._table.renewals(slot))
            self._table.grant(slot, lease)
        return KVHandle(
            request_id=request_id,
            branch=branch,
            connector=self._connector,
            pool=self._pool_name,
            generation=self._generation,
            slot=slot,
            lease=lease,
            blocks=tuple(context.blocks),
            tokens=context.tokens,
            next_position=context.next_position,
            geometry=self._pool.geometry,
            expires_at=expires_at,
            address=self._address,
        )

    def reclaim(self) -> int:
        """End every lease that was released or has expired; how many there were."""
        now = self._clock()
        for slot, lease in self._leases.items():
            if self._table.renewals(slot) != lease.renewals:
                lease.renewals, lease.expires_at = self._table.renewals(slot), now + lease.ttl_s
        ended = [
            slot
            for slot, lease in self._leases.items()
            if self._table.released(slot) == lease.lease or lease.expires_at <= now
        ]
        for slot in ended:
            self._end(slot)
        return len(ended)

    def revoke(self, request_id: str) -> int:
        """End every lease of a request that was aborted or failed; how many there were."""
        ended = [slot for slot, lease in self._leases.items() if lease.request_id == request_id]
        for slot in ended:
            self._end(slot)
        return len(ended)

    def close(self) -> None:
        """End every lease and the generation."""
        for slot in list(self._leases):
            self._end(slot)
        self._table.open(0)

    def _end(self, slot: int) -> None:
        # The word changes before the blocks are freed, so that a late reader sees it.
        self._table.grant(slot, 0)
        self._leases.pop(slot).context.free()
        self._free_slots.append(slot)
