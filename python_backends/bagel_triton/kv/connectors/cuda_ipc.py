"""``cuda_ipc``: the arena is memory of one GPU that both stages map.

The producer allocates one pool and exports it once; the consumer opens it once and keeps it.
The GPU is named by its UUID, since processes may number the GPUs they see differently. The
lease words stay in a file of the host's shared memory, exactly as for ``shm``.

Ordering: a mapping carries none. Whoever publishes synchronises the stream that wrote the
context first; the consumer synchronises its copy before it reads the words again and gives
the lease back. So neither side ever waits for an event of the other.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bagel_triton.contexts import ContextHandle, CudaAddress, KVGeometry
from bagel_triton.errors import LeaseError
from bagel_triton.kv.arena import KVArena
from bagel_triton.kv.connectors.base import ConnectorUnavailable, MappedConsumer, Producer
from bagel_triton.kv.connectors.shm import SharedWords, new_name
from bagel_triton.kv.cuda_pool import CudaPool, refuse_expandable_segments
from bagel_triton.kv.lease import LeaseBook, LeaseTable
from bagel_triton.kv.store import store_shape, token_bytes
from bagel_triton.model.cuda_bytes import device_of, device_uuid


class CudaIpcProducer(Producer):
    """An arena of ``blocks`` blocks on ``device``.

    Raises:
        ConnectorUnavailable: CUDA IPC cannot be used.
        MemoryError: the GPU or ``/dev/shm`` is too small.
    """

    def __init__(self, geometry: KVGeometry, blocks: int, prefix: str, device: torch.device) -> None:
        refuse_expandable_segments()
        slots = blocks * geometry.block_tokens
        self._pool = CudaPool.allocate(device, slots * token_bytes(geometry))
        address = CudaAddress(device_uuid(device), self._pool.export(), slots)
        name, generation = new_name(prefix)
        self._words = SharedWords.create(name)
        self.arena = KVArena(_store(self._pool, geometry, slots), geometry)
        table = LeaseTable(self._words.array)
        self.leases = LeaseBook(self.arena, table, name, "cuda_ipc", generation, address=address)

    def close(self) -> None:
        """End all leases and unlink the words; the GPU's memory returns when the process ends."""
        self.leases.close()
        self._words.unlink()


class CudaIpcConsumer(MappedConsumer):
    """Maps arenas of its host's GPUs and keeps the mapping of the newest."""

    def __init__(self) -> None:
        refuse_expandable_segments()
        self._attached: tuple[str, CudaPool, Tensor, LeaseTable] | None = None

    def attach(self, handle: ContextHandle) -> tuple[Tensor, LeaseTable]:
        """The mapped store and table of the handle's arena."""
        if self._attached is None or self._attached[0] != handle.arena:
            self.close()
            words = SharedWords.open(handle)
            pool = _open(handle)
            slots = pool.size // token_bytes(handle.geometry)
            self._attached = (handle.arena, pool, _store(pool, handle.geometry, slots), LeaseTable(words.array))
        return self._attached[2], self._attached[3]

    def close(self) -> None:
        """End the mapping."""
        if self._attached is not None:
            pool = self._attached[1]
            self._attached = None
            pool.close()


def _store(pool: CudaPool, geometry: KVGeometry, slots: int) -> Tensor:
    return pool.tensor().view(getattr(torch, geometry.dtype)).view(store_shape(geometry, slots))


def _open(handle: ContextHandle) -> CudaPool:
    what, address = f"the lease of request {handle.request_id}", handle.address
    if not isinstance(address, CudaAddress):
        raise LeaseError(f"{what} is of connector {handle.connector}; this stage has cuda_ipc")
    device = device_of(address.device)
    if device is None:
        raise LeaseError(f"{what} is on GPU {address.device}, which this process does not see")
    try:
        return CudaPool.open(device, address.memory, address.slots * token_bytes(handle.geometry))
    except ConnectorUnavailable as error:
        raise LeaseError(f"{what}: its arena on {device} cannot be mapped: {error}") from error
