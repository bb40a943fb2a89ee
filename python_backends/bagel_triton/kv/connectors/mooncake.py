"""``mooncake``: the arena is memory of the thinker's process that the DiT reads over a network.

The producer registers its store and, beside it, the lease words with a transfer engine.
A handle carries the engine's name and both addresses. The consumer follows the protocol
of :mod:`bagel_triton.kv.lease` by transfers: it reads the header and a slot's words
before and after its copy, and writes the words that are the consumer's.

No clock is compared between the hosts: a lease's time is the producer's own, who says by
its ``granted`` word that a lease has ended; a consumer that needs longer raises
``renewals``. A consumer that cannot reach the producer any more holds nothing there for
longer than the lease's time.
"""

from __future__ import annotations

import logging
import time

import numpy as np
import torch
from torch import Tensor

from bagel_triton.kv.block_pool import KVCachePool
from bagel_triton.kv.connectors.base import Consumer, Producer, check_blocks
from bagel_triton.kv.connectors.transfer_engine import Piece, TransferEngine
from bagel_triton.kv.lease import LeaseManager, LeaseTable, consumer_words, row_bytes, table_words
from bagel_triton.kv.store import runs_of, store_shape
from bagel_triton.protocol.errors import LeaseError
from bagel_triton.protocol.messages import KVGeometry, KVHandle, MooncakeAddress

log = logging.getLogger(__name__)


class MooncakeProducer(Producer):
    """An arena of ``blocks`` blocks in this process's memory, registered with ``engine``."""

    def __init__(self, geometry: KVGeometry, blocks: int, prefix: str, engine: TransferEngine) -> None:
        generation = time.time_ns()
        slots = blocks * geometry.block_tokens
        store = torch.zeros(store_shape(geometry, slots), dtype=getattr(torch, geometry.dtype))
        self._words = np.zeros(table_words(), dtype=np.int64)
        self._engine: TransferEngine | None = engine
        engine.register(store.data_ptr(), store.nbytes)
        engine.register(self._words.ctypes.data, self._words.nbytes)
        self.arena = KVCachePool(store, geometry)
        address = MooncakeAddress(engine.peer, store.data_ptr(), self._words.ctypes.data, slots)
        name = f"{prefix}_kv_{generation}"
        self.leases = LeaseManager(self.arena, LeaseTable(self._words), name, "mooncake", generation, address=address)

    def close(self) -> None:
        """End all leases and take the memory back from the network."""
        self.leases.close()
        if self._engine is not None:
            self._engine.unregister(self.arena.store.data_ptr())
            self._engine.unregister(self._words.ctypes.data)
            self._engine = None


class _RemoteTable(LeaseTable):
    """This host's copy of the words at ``base`` in ``peer``'s process, brought up to date row by row."""

    def __init__(self, engine: TransferEngine, peer: str, base: int) -> None:
        self._copy = np.zeros(table_words(), dtype=np.int64)
        super().__init__(self._copy)
        self._engine, self._peer, self._base = engine, peer, base
        engine.register(self._copy.ctypes.data, self._copy.nbytes)

    def fetch(self, slot: int) -> None:
        self._engine.read(self._peer, [self._piece(0, row_bytes()), self._piece((1 + slot) * row_bytes(), row_bytes())])

    def send(self, slot: int) -> None:
        first, last = consumer_words()
        try:
            self._engine.write(self._peer, [self._piece((1 + slot) * row_bytes() + first, last - first)])
        except LeaseError as error:  # what was copied is good, and the lease ends with its time
            log.warning("a lease could not be given back or renewed: %s", error)

    def close(self) -> None:
        """Take the copy back from the network."""
        self._engine.unregister(self._copy.ctypes.data)

    def _piece(self, offset: int, size: int) -> Piece:
        return (self._copy.ctypes.data + offset, self._base + offset, size)


class MooncakeConsumer(Consumer):
    """Reads arenas on any host that ``engine`` reaches.

    The CPU's memory is written in place where the transport allows that; RDMA and a GPU
    get a buffer between, as large as the largest context so far.
    """

    def __init__(self, engine: TransferEngine) -> None:
        self._engine = engine
        self._table: tuple[MooncakeAddress, _RemoteTable] | None = None
        self._buffer: Tensor | None = None

    def lease_table(self, handle: KVHandle) -> LeaseTable:
        """The words of the handle's arena; fetched when they are read, not before."""
        address = _address(handle)
        if self._table is None or self._table[0] != address:
            self._forget_table()
            self._table = (address, _RemoteTable(self._engine, address.peer, address.words))
        return self._table[1]

    def read(self, handle: KVHandle, destination: Tensor) -> None:
        """Transfer the context's runs of blocks, layer by layer, keys and values."""
        address = _address(handle)
        check_blocks(handle, address.slots)
        in_place = (
            self._engine.reads_unregistered_memory and not destination.is_cuda and destination[0, 0].is_contiguous()
        )
        target = destination if in_place else self._between(destination)
        self._engine.read(address.peer, _pieces(handle, address, target))
        if target is not destination:
            destination.copy_(target)
            if destination.is_cuda:
                torch.cuda.current_stream(destination.device).synchronize()

    def _between(self, destination: Tensor) -> Tensor:
        """Registered memory in the form of ``destination``."""
        if self._buffer is None or self._buffer.numel() < destination.nbytes:
            self._forget_buffer()
            self._buffer = torch.empty(destination.nbytes, dtype=torch.uint8, pin_memory=destination.is_cuda)
            self._engine.register(self._buffer.data_ptr(), self._buffer.nbytes)
        return self._buffer[: destination.nbytes].view(destination.dtype).view(destination.shape)

    def _forget_table(self) -> None:
        if self._table is not None:
            self._table[1].close()
            self._table = None

    def _forget_buffer(self) -> None:
        if self._buffer is not None:
            self._engine.unregister(self._buffer.data_ptr())
            self._buffer = None

    def close(self) -> None:
        """Forget the arena and the buffer."""
        self._forget_table()
        self._forget_buffer()


def _address(handle: KVHandle) -> MooncakeAddress:
    if not isinstance(handle.address, MooncakeAddress):
        raise LeaseError(
            f"the lease of request {handle.request_id} is of connector {handle.connector}; this stage has mooncake"
        )
    return handle.address


def _pieces(handle: KVHandle, address: MooncakeAddress, target: Tensor) -> list[Piece]:
    """Where each run of consecutive tokens comes from and goes to."""
    geometry, itemsize = handle.geometry, target.element_size()
    token = geometry.kv_heads * geometry.head_dim * itemsize
    runs = runs_of(handle.blocks, handle.tokens, geometry.block_tokens)
    pieces = []
    for plane in range(2 * geometry.layers):
        layer, side = divmod(plane, 2)
        local = target[layer, side].data_ptr()
        remote = address.store + plane * address.slots * token
        for run in runs:
            size = (run.stop - run.start) * token
            pieces.append((local, remote + run.start * token, size))
            local += size
    return pieces
