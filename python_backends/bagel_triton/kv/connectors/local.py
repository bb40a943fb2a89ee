"""``local``: producer and consumer are in one process and share the tensor itself."""

from __future__ import annotations

import itertools
import weakref

import numpy as np
import torch
from torch import Tensor

from bagel_triton.kv.block_pool import KVCachePool
from bagel_triton.kv.connectors.base import MappedConsumer, Producer
from bagel_triton.kv.lease import LeaseManager, LeaseTable, table_words
from bagel_triton.kv.store import new_store
from bagel_triton.protocol.errors import LeaseError
from bagel_triton.protocol.messages import KVGeometry, KVHandle

_generations = itertools.count(1)
_producers: weakref.WeakValueDictionary[str, LocalProducer] = weakref.WeakValueDictionary()


class LocalProducer(Producer):
    """A pool of ``blocks`` blocks on ``device`` in this process."""

    def __init__(self, geometry: KVGeometry, blocks: int, device: torch.device) -> None:
        generation = next(_generations)
        self.name = f"local_{generation}"
        self.store = new_store(geometry, blocks * geometry.block_tokens, device)
        self.table = LeaseTable(np.zeros(table_words(), dtype=np.int64))
        self.pool = KVCachePool(self.store, geometry)
        self.leases = LeaseManager(self.pool, self.table, self.name, "local", generation)
        _producers[self.name] = self

    def close(self) -> None:
        """End all leases; consumers find the pool gone."""
        self.leases.close()
        _producers.pop(self.name, None)


class LocalConsumer(MappedConsumer):
    """Reads any :class:`LocalProducer` of this process."""

    def attach(self, handle: KVHandle) -> tuple[Tensor, LeaseTable]:
        """The producer's own store and table."""
        producer = _producers.get(handle.pool)
        if producer is None:
            raise LeaseError(f"pool {handle.pool} of request {handle.request_id} is gone")
        return producer.store, producer.table

    def close(self) -> None:
        """Nothing is held."""
