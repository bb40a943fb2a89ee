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
from bagel_triton.kv.store import store_shape
from bagel_triton.protocol.errors import LeaseError
from bagel_triton.protocol.messages import KVGeometry, KVHandle

_generations = itertools.count(1)
_producers: weakref.WeakValueDictionary[str, LocalProducer] = weakref.WeakValueDictionary()


class LocalProducer(Producer):
    """An arena of ``blocks`` blocks on ``device`` in this process."""

    def __init__(self, geometry: KVGeometry, blocks: int, device: torch.device) -> None:
        generation = next(_generations)
        self.name = f"local_{generation}"
        shape = store_shape(geometry, blocks * geometry.block_tokens)
        self.store = torch.zeros(shape, dtype=getattr(torch, geometry.dtype), device=device)
        self.table = LeaseTable(np.zeros(table_words(), dtype=np.int64))
        self.arena = KVCachePool(self.store, geometry)
        self.leases = LeaseManager(self.arena, self.table, self.name, "local", generation)
        _producers[self.name] = self

    def close(self) -> None:
        """End all leases; consumers find the arena gone."""
        self.leases.close()
        _producers.pop(self.name, None)


class LocalConsumer(MappedConsumer):
    """Reads any :class:`LocalProducer` of this process."""

    def attach(self, handle: KVHandle) -> tuple[Tensor, LeaseTable]:
        """The producer's own store and table."""
        producer = _producers.get(handle.arena)
        if producer is None:
            raise LeaseError(f"arena {handle.arena} of request {handle.request_id} is gone")
        return producer.store, producer.table

    def close(self) -> None:
        """Nothing is held."""
