"""``mooncake_store``: contexts are objects in Mooncake's store, put by the thinker, got by the DiT.

Where ``mooncake`` lets the DiT read the thinker's arena, here a lease is an object of its
own, so its blocks are free as soon as it is published; the price is a second copy in the
store's memory, and the thinker's time to write it. The words of the lease table become keys:

======== ===========================================================================
granted  the key ``ARENA/LEASE`` is there; an arena's name holds its generation
released the consumer deletes that key
renewals the consumer changes what is noted under ``ARENA/LEASE/renewals``
======== ===========================================================================

Keys never repeat. An object that is deleted while it is read may be written over, so a
claim looks again after its copy, as on shared memory. A producer that dies takes its part of
the store, and so its objects, along; what they were is refused. No clock is compared.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bagel_triton.kv.block_pool import KVCacheFull, KVCachePool, KVSequence
from bagel_triton.kv.connectors.base import Consumer, LeaseView, Producer
from bagel_triton.kv.connectors.object_store import ObjectStore, StoreFull
from bagel_triton.kv.store import gather, store_shape
from bagel_triton.protocol.errors import LeaseError
from bagel_triton.protocol.messages import Branch, KVGeometry, KVHandle

log = logging.getLogger(__name__)


def _key(handle: KVHandle) -> str:
    return f"{handle.arena}/{handle.lease}"


def _renewals(key: str) -> str:
    return f"{key}/renewals"


class _Buffer:
    """Memory that the store may read and write, as large as the largest context so far."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._bytes: Tensor | None = None

    def like(self, geometry: KVGeometry, tokens: int) -> Tensor:
        """Room for a context: [layers, 2, tokens, kv_heads, head_dim], with whatever is in it."""
        dtype = getattr(torch, geometry.dtype)
        shape = store_shape(geometry, tokens)
        size = torch.Size(shape).numel() * dtype.itemsize
        if self._bytes is None or self._bytes.numel() < size:
            self.close()
            self._bytes = torch.empty(size, dtype=torch.uint8)
            self._store.register(self._bytes.data_ptr(), size)
        return self._bytes[:size].view(dtype).view(shape)

    def close(self) -> None:
        """Take the memory back."""
        if self._bytes is not None:
            self._store.unregister(self._bytes.data_ptr())
            self._bytes = None


@dataclass
class _Stored:
    request_id: str
    key: str
    blocks: int
    ttl_s: float
    expires_at: float
    renewals: bytes = b""


class StoreLeases:
    """The producer's side, as :class:`~bagel_triton.kv.lease.LeaseManager`: same calls, same ends."""

    def __init__(
        self,
        arena: KVCachePool,
        store: ObjectStore,
        name: str,
        generation: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._arena, self._store, self._name, self._generation, self._clock = arena, store, name, generation, clock
        self._buffer = _Buffer(store)
        self._leases: list[_Stored] = []
        self._last_lease = 0

    def __len__(self) -> int:
        return len(self._leases)

    @property
    def blocks(self) -> int:
        """Blocks' worth of contexts in the store: the thinker admits no more than the arena's size."""
        return sum(lease.blocks for lease in self._leases)

    def publish(self, request_id: str, branch: Branch, context: KVSequence, ttl_s: float) -> KVHandle:
        """Lend a copy of ``context`` for ``ttl_s`` seconds; its own blocks are free on return.

        Raises:
            ArenaFull: the store has no room; the caller still owns the context.
            LeaseError: the store's master does not answer; likewise.
        """
        lease, tokens, next_position, blocks = 0, context.tokens, context.next_position, tuple(context.blocks)
        expires_at = self._clock() + ttl_s
        if tokens:
            self._last_lease = lease = self._last_lease + 1
            key = f"{self._name}/{lease}"
            copy = self._buffer.like(self._arena.geometry, tokens)
            gather(self._arena.store, self._arena.read_slots(context), copy)
            try:
                self._store.put(key, copy.data_ptr(), copy.nbytes)
            except StoreFull as error:
                raise KVCacheFull(str(error)) from error
            self._leases.append(_Stored(request_id, key, len(blocks), ttl_s, expires_at))
            context.free()
        return KVHandle(
            request_id=request_id,
            branch=branch,
            connector="mooncake_store",
            arena=self._name,
            generation=self._generation,
            slot=0,
            lease=lease,
            blocks=blocks,  # as a handle must have; whose they are by now is of no account
            tokens=tokens,
            next_position=next_position,
            geometry=self._arena.geometry,
            expires_at=expires_at,
        )

    def reclaim(self) -> int:
        """Forget every lease that was released, delete those that have expired; how many there were."""
        if not self._leases:
            return 0
        now = self._clock()
        try:
            there = self._store.exist([lease.key for lease in self._leases])
            for lease in self._leases:
                if lease.expires_at <= now and (renewals := self._store.noted(_renewals(lease.key))) != lease.renewals:
                    lease.renewals, lease.expires_at = renewals, now + lease.ttl_s
        except LeaseError as error:
            log.warning("leases cannot be looked up, and end with their time: %s", error)
            there = [True] * len(self._leases)
        found = zip(self._leases, there, strict=True)
        return self._end([lease for lease, exists in found if not exists or lease.expires_at <= now])

    def withdraw(self, request_id: str) -> int:
        """Delete every lease of a request at once (cancelled, failed); how many."""
        return self._end([lease for lease in self._leases if lease.request_id == request_id])

    def close(self) -> None:
        """End every lease."""
        self._end(list(self._leases))
        self._buffer.close()

    def _end(self, ended: list[_Stored]) -> int:
        if ended:
            self._leases = [lease for lease in self._leases if lease not in ended]
            keys = [lease.key for lease in ended]
            try:
                self._store.remove(keys + [_renewals(key) for key in keys])
            except LeaseError as error:
                log.warning("leases could not be deleted from the store: %s", error)
        return len(ended)


class MooncakeStoreProducer(Producer):
    """An arena of ``blocks`` blocks in this process's memory, whose contexts are copied to the store."""

    def __init__(self, geometry: KVGeometry, blocks: int, prefix: str, store: ObjectStore) -> None:
        generation = time.time_ns()
        tokens = torch.zeros(
            store_shape(geometry, blocks * geometry.block_tokens), dtype=getattr(torch, geometry.dtype)
        )
        self.arena = KVCachePool(tokens, geometry)
        self.leases = StoreLeases(self.arena, store, f"{prefix}_kv_{generation}", generation)
        self._store: ObjectStore | None = store

    def close(self) -> None:
        """End all leases and leave the store."""
        if self._store is not None:
            self.leases.close()
            self._store.close()
            self._store = None


class _StoredLease:
    """One handle's words, which are keys."""

    def __init__(self, store: ObjectStore, handle: KVHandle) -> None:
        self._store, self._key = store, _key(handle)

    def carries(self, handle: KVHandle) -> bool:
        return self._store.exist([self._key])[0]

    def check(self, handle: KVHandle) -> None:
        if not self.carries(handle):
            raise LeaseError(
                f"lease {handle.lease} of request {handle.request_id}, branch {handle.branch} has ended or was "
                "released before"
            )

    def release(self, slot: int, lease: int) -> None:
        try:
            self._store.remove([self._key, _renewals(self._key)])
        except LeaseError as error:  # what was copied is good, and the lease ends with its time
            log.warning("a lease could not be given back: %s", error)

    def renew(self, slot: int) -> None:
        self._store.note(_renewals(self._key), str(time.monotonic_ns()).encode())  # only that it changes counts


class MooncakeStoreConsumer(Consumer):
    """Gets contexts from the store, by way of a buffer."""

    def __init__(self, store: ObjectStore) -> None:
        self._store, self._buffer = store, _Buffer(store)

    def lease_table(self, handle: KVHandle) -> LeaseView:
        """The keys of the handle's lease."""
        if handle.connector != "mooncake_store":
            raise LeaseError(
                f"the lease of request {handle.request_id} is of connector {handle.connector}; "
                "this stage has mooncake_store"
            )
        return _StoredLease(self._store, handle)

    def read(self, handle: KVHandle, destination: Tensor) -> None:
        """Get the whole context, then copy it to its place."""
        copy = self._buffer.like(handle.geometry, handle.tokens)
        size = self._store.get(_key(handle), copy.data_ptr(), copy.nbytes)
        if size != copy.nbytes:
            reason = "its stage has ended or is out of reach" if size < 0 else f"it has {size} bytes, not {copy.nbytes}"
            raise LeaseError(f"the context of request {handle.request_id} cannot be read: {reason}")
        destination.copy_(copy)

    def close(self) -> None:
        """Leave the store."""
        self._buffer.close()
        self._store.close()
