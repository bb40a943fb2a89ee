"""``cuda_ipc``: the pool is memory of one GPU that both stages map.

The producer makes one allocation and exports it once; the consumer opens it once and keeps it.
The GPU is named by its UUID, since processes may number the GPUs they see differently. The
lease words stay in a file of the host's shared memory, exactly as for ``shm``.

A mapping carries no ordering. The publisher synchronises the stream that wrote the KV first;
the consumer synchronises its copy before it reads the words again and releases the lease.
Neither side waits for an event of the other.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from bagel_triton.ipc.cuda_memory import CudaBytes, device_of, device_uuid
from bagel_triton.kv.block_pool import KVCachePool
from bagel_triton.kv.connectors.base import ConnectorUnavailable, MappedConsumer, Producer
from bagel_triton.kv.connectors.shm import SharedWords, new_name
from bagel_triton.kv.lease import LeaseManager, LeaseTable
from bagel_triton.kv.store import store_shape, token_bytes
from bagel_triton.protocol.errors import LeaseError
from bagel_triton.protocol.messages import CudaAddress, KVGeometry, KVHandle


class CudaIpcProducer(Producer):
    """A pool of ``blocks`` blocks on ``device``.

    Raises:
        ConnectorUnavailable: CUDA IPC cannot be used.
        MemoryError: the GPU or ``/dev/shm`` is too small.
    """

    def __init__(self, geometry: KVGeometry, blocks: int, prefix: str, device: torch.device) -> None:
        slots = blocks * geometry.block_tokens
        self._allocation = CudaAllocation.allocate(device, slots * token_bytes(geometry))
        address = CudaAddress(device_uuid(device), self._allocation.export(), slots)
        name, generation = new_name(prefix)
        self._words = SharedWords.create(name)
        self.pool = KVCachePool(_store(self._allocation, geometry, slots), geometry)
        table = LeaseTable(self._words.array)
        self.leases = LeaseManager(self.pool, table, name, "cuda_ipc", generation, address=address)

    def close(self) -> None:
        """End all leases and unlink the words; the GPU's memory returns when the process ends."""
        self.leases.close()
        self._words.unlink()


class CudaIpcConsumer(MappedConsumer):
    """Maps pools of its host's GPUs and keeps the mapping of the newest."""

    def __init__(self) -> None:
        self._attached: tuple[str, CudaAllocation, Tensor, LeaseTable] | None = None

    def attach(self, handle: KVHandle) -> tuple[Tensor, LeaseTable]:
        """The mapped store and table of the handle's pool."""
        if self._attached is None or self._attached[0] != handle.pool:
            words = SharedWords.open(handle)
            allocation = _open(handle)
            self.close()  # not before: a stale handle must not end a good mapping
            slots = allocation.size // token_bytes(handle.geometry)
            self._attached = (
                handle.pool,
                allocation,
                _store(allocation, handle.geometry, slots),
                LeaseTable(words.array),
            )
        return self._attached[2], self._attached[3]

    def close(self) -> None:
        """End the mapping."""
        if self._attached is not None:
            allocation = self._attached[1]
            self._attached = None
            allocation.close()


def _store(allocation: CudaAllocation, geometry: KVGeometry, slots: int) -> Tensor:
    return allocation.tensor().view(getattr(torch, geometry.dtype)).view(store_shape(geometry, slots))


def _open(handle: KVHandle) -> CudaAllocation:
    what, address = f"the lease of request {handle.request_id}", handle.address
    if not isinstance(address, CudaAddress):
        raise LeaseError(f"{what} is of connector {handle.connector}; this stage has cuda_ipc")
    device = device_of(address.device)
    if device is None:
        raise LeaseError(f"{what} is on GPU {address.device}, which this process does not see")
    try:
        return CudaAllocation.open(device, address.memory, address.slots * token_bytes(handle.geometry))
    except ConnectorUnavailable as error:
        raise LeaseError(f"{what}: its pool on {device} cannot be mapped: {error}") from error


HANDLE_BYTES = 64  # CUDA_IPC_HANDLE_SIZE; not all versions of the bindings show a handle's bytes, but all its address


class CudaAllocation(CudaBytes):
    """GPU memory allocated here, or mapped from another process.

    An allocation is never freed before its process ends: freeing memory that another process
    has mapped is undefined, and the owner cannot know whether one has.
    """

    @classmethod
    def allocate(cls, device: torch.device, size: int) -> CudaAllocation:
        """New memory, zeroed.

        Raises:
            MemoryError: the GPU has no room.
        """
        runtime = _runtime(device)
        error, pointer = runtime.cudaMalloc(size)
        if error == runtime.cudaError_t.cudaErrorMemoryAllocation:
            free, _ = torch.cuda.mem_get_info(device)
            raise MemoryError(f"{device} has no room for {size} bytes of contexts; {free} are free: lower kv_tokens")
        _check(runtime, "cudaMalloc", error)
        allocation = cls(device, int(pointer), size)
        allocation.tensor().zero_()
        torch.cuda.synchronize(device)
        return allocation

    @classmethod
    def open(cls, device: torch.device, memory: bytes, size: int) -> CudaAllocation:
        """Another process's allocation by its handle; :meth:`close` ends the mapping."""
        if len(memory) != HANDLE_BYTES:
            raise ConnectorUnavailable(f"a CUDA IPC handle has {HANDLE_BYTES} bytes, not {len(memory)}")
        runtime = _runtime(device)
        handle = runtime.cudaIpcMemHandle_t()
        ctypes.memmove(handle.getPtr(), memory, HANDLE_BYTES)
        error, pointer = runtime.cudaIpcOpenMemHandle(handle, runtime.cudaIpcMemLazyEnablePeerAccess)
        _check(runtime, "cudaIpcOpenMemHandle", error)
        return cls(device, int(pointer), size)

    def export(self) -> bytes:
        """The handle by which another process, never this one, opens the allocation."""
        runtime = _runtime(self.device)
        error, handle = runtime.cudaIpcGetMemHandle(self.pointer)
        _check(runtime, "cudaIpcGetMemHandle", error)
        return ctypes.string_at(handle.getPtr(), HANDLE_BYTES)

    def close(self) -> None:
        """End a mapping that :meth:`open` made; its tensors must be gone."""
        runtime = _runtime(self.device)
        torch.cuda.synchronize(self.device)
        _check(runtime, "cudaIpcCloseMemHandle", runtime.cudaIpcCloseMemHandle(self.pointer)[0])


def _runtime(device: torch.device) -> Any:
    """The bindings, with ``device`` current in this thread for them and for torch."""
    try:
        from cuda.bindings import runtime
    except ImportError as error:
        raise ConnectorUnavailable(
            f"connector=cuda_ipc needs the package cuda-python, of the CUDA driver's major version: {error}"
        ) from error
    torch.cuda.set_device(device)
    _check(runtime, "cudaSetDevice", runtime.cudaSetDevice(torch.cuda.current_device())[0])
    return runtime


def _check(runtime: Any, call: str, error: Any) -> None:
    if error != runtime.cudaError_t.cudaSuccess:
        name = runtime.cudaGetErrorName(error)[1]
        raise ConnectorUnavailable(f"{call} failed: {name.decode() if isinstance(name, bytes) else name}")
