"""One allocation on a GPU that other processes may map: CUDA IPC, by NVIDIA's own Python bindings.

It is made with ``cudaMalloc``, outside torch's caching allocator: an IPC handle stands for a
whole allocation, and torch's may be cut up, moved or freed at any time.
"""

from __future__ import annotations

import ctypes
import os
from typing import Any

import torch

from bagel_triton.kv.connectors.base import ConnectorUnavailable
from bagel_triton.model.cuda_bytes import CudaBytes

HANDLE_BYTES = 64  # CUDA_IPC_HANDLE_SIZE; the bindings show a handle's address, not all of them its bytes
ALLOCATOR_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")


def refuse_expandable_segments() -> None:
    """Raise :class:`ConnectorUnavailable` where torch's allocator is set to use virtual memory.

    Its memory cannot be exported by the handles used here, and its own way of sharing needs
    rights that containers lack; so it is refused for a whole stage, before anything is shared.
    """
    for variable in ALLOCATOR_VARIABLES:
        value = os.environ.get(variable, "")
        if "expandable_segments:true" in value.replace(" ", "").lower():
            raise ConnectorUnavailable(f"{variable}={value!r}: connector=cuda_ipc needs expandable_segments:False")


class CudaPool(CudaBytes):
    """A pool allocated here, or mapped from another process.

    An allocation is never freed before its process ends: to free what another process has
    mapped is undefined, and there is no telling whether one has.
    """

    @classmethod
    def allocate(cls, device: torch.device, size: int) -> CudaPool:
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
        pool = cls(device, int(pointer), size)
        pool.tensor().zero_()
        torch.cuda.synchronize(device)
        return pool

    @classmethod
    def open(cls, device: torch.device, memory: bytes, size: int) -> CudaPool:
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
