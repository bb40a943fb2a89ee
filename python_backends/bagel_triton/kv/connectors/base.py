"""The connector contract: a producer lends sequences, a consumer claims them; and the self-test of both.

In the self-test the thinker lends a pattern, and the DiT claims and compares it. Both ends run in
the stages' own processes, on the engines' threads, so it covers what requests use: the mapping or
connection, the lease words, the copy.
"""

from __future__ import annotations

import secrets
import zlib
from abc import ABC, abstractmethod
from typing import Protocol

import torch
from torch import Tensor

from bagel_triton.kv.block_pool import KVCachePool, KVSequence
from bagel_triton.kv.lease import LeaseTable
from bagel_triton.kv.store import gather, slots_of, store_shape
from bagel_triton.protocol.errors import LeaseError
from bagel_triton.protocol.messages import Branch, KVGeometry, KVHandle


class ConnectorUnavailable(RuntimeError):
    """A connector cannot be used on this machine; the message names the missing requirement."""


class Leases(Protocol):
    """A producer's leases; :class:`~bagel_triton.kv.lease.LeaseManager` documents the calls."""

    def __len__(self) -> int: ...

    @property
    def blocks(self) -> int: ...

    def publish(self, request_id: str, branch: Branch, context: KVSequence, ttl_s: float) -> KVHandle: ...

    def reclaim(self) -> int: ...

    def revoke(self, request_id: str) -> int: ...

    def close(self) -> None: ...


class LeaseView(Protocol):
    """A consumer's view of a lease; :class:`~bagel_triton.kv.lease.LeaseTable` documents the calls."""

    def carries(self, handle: KVHandle) -> bool: ...

    def check(self, handle: KVHandle) -> None: ...

    def release(self, slot: int, lease: int) -> None: ...

    def renew(self, slot: int) -> None: ...


class Producer(ABC):
    """The thinker's end: a pool that others can read, and the leases on it.

    Lifetime: from construction to :meth:`close`, which ends every lease and removes everything
    created outside the process. Threads: one. Ordering: a sequence's KV is in memory before its
    lease is granted; on a GPU, the publisher synchronises the stream that wrote it first.
    """

    pool: KVCachePool
    leases: Leases

    @abstractmethod
    def close(self) -> None:
        """End all leases and remove the pool."""


class Consumer(ABC):
    """The DiT's end. It holds nothing between claims but mappings and connections.

    Threads: one. Ordering: a claim returns and releases its lease only after the copy is
    complete, on a GPU too. Errors: :class:`LeaseError` for anything wrong with a lease or its
    pool. No call waits without a limit: a dead producer is noticed.
    """

    @abstractmethod
    def lease_table(self, handle: KVHandle) -> LeaseView:
        """The lease words of the pool that ``handle`` points into.

        Raises:
            LeaseError: the producer's pool is gone.
        """

    @abstractmethod
    def read(self, handle: KVHandle, destination: Tensor) -> None:
        """Copy the context into ``destination``, whose shape and dtype are right; done on return.

        Raises:
            LeaseError: the producer's pool is gone, or the handle names blocks outside it.
        """

    @abstractmethod
    def close(self) -> None:
        """Drop every mapping and connection."""

    def claim(self, handle: KVHandle, destination: Tensor) -> None:
        """Copy the lease's context into ``destination`` and release the lease.

        Args:
            destination: [layers, 2, tokens, kv_heads, head_dim] of the handle's dtype.

        Raises:
            LeaseError: a stale generation, a lease that was released or reclaimed, or a handle
                whose geometry, size or dtype is not the destination's. A lease that is still
                this request's is released in every case.
        """
        if not handle.lease:
            return
        expected = store_shape(handle.geometry, handle.tokens)
        table = self.lease_table(handle)
        table.check(handle)
        try:
            if tuple(destination.shape) != expected or str(destination.dtype) != f"torch.{handle.geometry.dtype}":
                raise LeaseError(
                    f"context of request {handle.request_id} is {handle.geometry.dtype} {list(expected)}; "
                    f"the reader expects {str(destination.dtype).removeprefix('torch.')} {list(destination.shape)}"
                )
            self.read(handle, destination)
            table.check(handle)  # if it was reclaimed during the copy, the contents may be another request's
        finally:
            table.release(handle.slot, handle.lease)

    def renew(self, handle: KVHandle) -> None:
        """Keep a lease from expiring; one that has ended stays so."""
        if handle.lease and (table := self._carrying(handle)):
            table.renew(handle.slot)

    def release(self, handle: KVHandle) -> None:
        """Release a lease unread; nothing happens if it has ended."""
        if handle.lease and (table := self._carrying(handle)):
            table.release(handle.slot, handle.lease)

    def _carrying(self, handle: KVHandle) -> LeaseView | None:
        """The table that still carries the lease of ``handle``; None once that has ended."""
        try:
            table = self.lease_table(handle)
            return table if table.carries(handle) else None
        except LeaseError:  # the pool is gone, and every lease on it has ended
            return None


def check_blocks(handle: KVHandle, slots: int) -> None:
    """Raise :class:`LeaseError` unless the blocks hold the tokens and lie in a store of ``slots``."""
    size = handle.geometry.block_tokens
    if handle.tokens > len(handle.blocks) * size or any(not 0 <= block * size < slots for block in handle.blocks):
        raise LeaseError(f"the handle of request {handle.request_id} names blocks {handle.blocks}, not its own")


class MappedConsumer(Consumer):
    """A consumer that sees the producer's memory as a tensor of its own."""

    @abstractmethod
    def attach(self, handle: KVHandle) -> tuple[Tensor, LeaseTable]:
        """The store and lease table that ``handle`` points into.

        Raises:
            LeaseError: the producer's pool is gone.
        """

    def lease_table(self, handle: KVHandle) -> LeaseTable:
        return self.attach(handle)[1]

    def read(self, handle: KVHandle, destination: Tensor) -> None:
        store, _ = self.attach(handle)
        check_blocks(handle, store.shape[2])
        gather(store, slots_of(handle.blocks, handle.tokens, handle.geometry.block_tokens), destination)
        if destination.is_cuda:
            # The lease is released by the CPU, which must not happen before the GPU's copy.
            torch.cuda.current_stream(destination.device).synchronize()


SELFTEST_BLOCKS = 4
SELFTEST_TTL_S = 10.0


def lend_pattern(producer: Producer, ttl_s: float = SELFTEST_TTL_S) -> KVHandle:
    """A lease on a pattern of a few scattered blocks, the last one not full.

    Raises:
        KVCacheFull: there is no room for it.
    """
    pool, geometry = producer.pool, producer.pool.geometry
    request_id = f"selftest-{secrets.token_hex(8)}"
    size = geometry.block_tokens
    context, gaps = KVSequence(pool), KVSequence(pool)
    try:
        for block in range(min(SELFTEST_BLOCKS, pool.blocks.count // 2)):
            context.extend(size if block < SELFTEST_BLOCKS - 1 else max(1, size - 1))
            gaps.extend(size)
        slots = pool.slots(context.blocks, 0, context.tokens)
        pool.store[:, :, slots] = _pattern(request_id, geometry, context.tokens).to(pool.store.device)
        if pool.store.is_cuda:
            torch.cuda.current_stream(pool.store.device).synchronize()
        handle = producer.leases.publish(request_id, Branch.GEN, context, ttl_s)
    except Exception:
        context.free()
        raise
    finally:
        gaps.free()
    return handle


def read_pattern(consumer: Consumer, handle: KVHandle, device: torch.device) -> None:
    """Claim the lease of :func:`lend_pattern` into memory of ``device`` and compare.

    Raises:
        LeaseError: it cannot be claimed, or the contents differ.
    """
    if handle.tokens > SELFTEST_BLOCKS * handle.geometry.block_tokens:
        raise LeaseError(f"{handle.tokens} tokens are more than a self-test lends")
    expected = _pattern(handle.request_id, handle.geometry, handle.tokens)
    found = torch.empty(expected.shape, dtype=expected.dtype, device=device)
    consumer.claim(handle, found)
    wrong = int((found.cpu() != expected).sum())
    if wrong or not handle.tokens:
        raise LeaseError(
            f"the self-test of connector {handle.connector} read {wrong} of {expected.numel()} numbers wrong"
        )


def _pattern(request_id: str, geometry: KVGeometry, tokens: int) -> Tensor:
    """Small integers, exact in every dtype and different for every request."""
    generator = torch.Generator().manual_seed(zlib.crc32(request_id.encode()))
    numbers = torch.randint(-128, 128, store_shape(geometry, tokens), generator=generator)
    return numbers.to(getattr(torch, geometry.dtype))
