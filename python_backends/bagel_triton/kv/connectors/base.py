"""The contract between the stage that fills contexts and the stage that reads them."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from bagel_triton.errors import LeaseError
from bagel_triton.kv.arena import KVArena
from bagel_triton.kv.lease import LeaseBook, LeaseTable
from bagel_triton.kv.store import gather, slots_of, store_shape
from bagel_triton.messages import ContextHandle


class Producer(ABC):
    """The thinker's end: an arena others can read, and the leases on it.

    Lifetime: from construction to :meth:`close`, which ends every lease and removes what
    it created outside the process. Threads: one. Ordering: a context's keys and values
    are in memory before its lease is granted.
    """

    arena: KVArena
    leases: LeaseBook

    @abstractmethod
    def close(self) -> None:
        """End all leases and remove the arena."""


class Consumer(ABC):
    """The DiT's end. Threads: one. It holds nothing between claims but mappings."""

    @abstractmethod
    def attach(self, handle: ContextHandle) -> tuple[Tensor, LeaseTable]:
        """The store and lease table that ``handle`` points into.

        Raises:
            LeaseError: the producer's arena is gone.
        """

    @abstractmethod
    def close(self) -> None:
        """Drop every mapping."""

    def claim(self, handle: ContextHandle, destination: Tensor) -> None:
        """Copy the lease's context into ``destination`` and release the lease.

        Args:
            destination: [layers, 2, tokens, kv_heads, head_dim] of the handle's dtype.

        Raises:
            LeaseError: stale generation, a lease that was released or taken back, or a
                handle whose geometry, size or dtype is not the destination's. A lease that
                is still this request's is released all the same.
        """
        if not handle.lease:
            return
        expected = store_shape(handle.geometry, handle.tokens)
        store, table = self.attach(handle)
        table.check(handle)
        try:
            if tuple(destination.shape) != expected or str(destination.dtype) != f"torch.{handle.geometry.dtype}":
                raise LeaseError(
                    f"context of request {handle.request_id} is {handle.geometry.dtype} {list(expected)}; "
                    f"the reader expects {str(destination.dtype).removeprefix('torch.')} {list(destination.shape)}"
                )
            size, capacity = handle.geometry.block_tokens, store.shape[2]
            if handle.tokens > len(handle.blocks) * size or any(not 0 <= b * size < capacity for b in handle.blocks):
                raise LeaseError(f"the handle of request {handle.request_id} names blocks {handle.blocks}, not its own")
            gather(store, slots_of(handle.blocks, handle.tokens, handle.geometry.block_tokens), destination)
            table.check(handle)  # reclaimed during the copy: what was read may be another's
        finally:
            table.release(handle.slot, handle.lease)

    def renew(self, handle: ContextHandle) -> None:
        """Keep a lease that is still wanted from expiring; one that has ended stays so."""
        if handle.lease:
            _, table = self.attach(handle)
            if table.generation == handle.generation and table.granted(handle.slot) == handle.lease:
                table.renew(handle.slot)

    def release(self, handle: ContextHandle) -> None:
        """Give a lease back unread; one that has ended already is left alone."""
        if not handle.lease:
            return
        _, table = self.attach(handle)
        if table.generation == handle.generation and table.granted(handle.slot) == handle.lease:
            table.release(handle.slot, handle.lease)
