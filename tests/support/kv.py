"""Contexts with known contents, for the tests of pools, leases and connectors."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from bagel_triton.kv.block_pool import KVCachePool, KVSequence
from bagel_triton.kv.connectors.base import Consumer, MappedConsumer
from bagel_triton.kv.lease import LeaseManager, LeaseTable, table_words
from bagel_triton.kv.store import gather, store_shape
from bagel_triton.protocol.messages import Branch, KVGeometry, KVHandle

GEOMETRY = KVGeometry(layers=2, kv_heads=1, head_dim=4, block_tokens=4, dtype="float32")


def new_arena(blocks: int, geometry: KVGeometry = GEOMETRY) -> KVCachePool:
    """An empty pool in this process' memory."""
    return KVCachePool(torch.zeros(store_shape(geometry, blocks * geometry.block_tokens)), geometry)


def contents_of(labels: Sequence[int], geometry: KVGeometry = GEOMETRY) -> Tensor:
    """Keys and values of the tokens named ``labels``, no two numbers alike.

    [layers, 2, tokens, kv_heads, head_dim] float32.
    """
    layers, sides, _, heads, width = store_shape(geometry, 0)
    places = torch.arange(layers * sides * heads * width).reshape(layers, sides, 1, heads, width)
    return torch.tensor(list(labels))[None, None, :, None, None] * 1000.0 + places


def append(pool: KVCachePool, context: KVSequence, labels: Sequence[int]) -> None:
    """Extend ``context`` by the tokens named ``labels`` and write their keys and values."""
    pool.store[:, :, context.extend(len(labels))] = contents_of(labels, pool.geometry).to(pool.store)
    context.next_position += len(labels)


def read(pool: KVCachePool, context: KVSequence) -> Tensor:
    """All keys and values of ``context``."""
    out = torch.empty(store_shape(pool.geometry, context.tokens))
    gather(pool.store, pool.read_slots(context), out)
    return out


def claim(consumer: Consumer, handle: KVHandle) -> Tensor:
    """The contents that ``handle`` lends."""
    dtype = getattr(torch, handle.geometry.dtype)
    destination = torch.full(store_shape(handle.geometry, handle.tokens), -1, dtype=dtype)
    consumer.claim(handle, destination)
    return destination


class Clock:
    """A producer's clock that moves only when told to; far ahead of the real one."""

    def __init__(self) -> None:
        self.now = time.monotonic() + 1e6

    def __call__(self) -> float:
        return self.now


class Lender(MappedConsumer):
    """A pool with leases, and at once its reader."""

    def __init__(self, blocks: int, generation: int = 7) -> None:
        self.pool = new_arena(blocks)
        self.table = LeaseTable(np.zeros(table_words(), dtype=np.int64))
        self.clock = Clock()
        self.book = LeaseManager(self.pool, self.table, "pool", "test", generation, self.clock)

    def context(self, labels: Sequence[int]) -> KVSequence:
        """A context of the tokens named ``labels``."""
        context = KVSequence(self.pool)
        append(self.pool, context, labels)
        return context

    def lend(self, labels: Sequence[int], request_id: str = "r", ttl_s: float = 10.0) -> KVHandle:
        """A lease on a new context of the tokens named ``labels``."""
        return self.book.publish(request_id, Branch.GEN, self.context(labels), ttl_s)

    def attach(self, handle: KVHandle) -> tuple[Tensor, LeaseTable]:
        return self.pool.store, self.table

    def close(self) -> None:
        self.book.close()
