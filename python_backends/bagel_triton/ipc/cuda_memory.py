"""Memory of a GPU that outlives the process which allocated it, by CUDA's virtual memory management.

An allocation can be exported as a POSIX file descriptor. The driver frees it with its last
mapping, handle and descriptor in any process, so it outlives the exporter. Memory behind a
CUDA IPC handle, which contexts use, does not.

Access: mappings are read-only where the driver grants that. It may ignore the flag, so nothing
relies on it.

If a call of the driver fails, everything made before it is freed.
"""

from __future__ import annotations

import logging
import os
import weakref
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)


class NotShareable(RuntimeError):
    """Memory of a device cannot be given to another process here; the message says why."""


class CudaMemory:
    """Memory of ``device``, a :class:`~bagel_triton.weights.sharing.DeviceMemory`."""

    alignment = 512  # of torch's own allocator; matrix kernels are chosen by the alignment they find

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @property
    def name(self) -> str:
        return device_uuid(self.device)

    def allocate(self, size: int) -> tuple[int, Tensor]:
        """A descriptor of new memory, and its bytes mapped for writing: uint8 [size]."""
        gpu = _Gpu(self.device)
        extent = gpu.extent(size)
        error, handle = gpu.driver.cuMemCreate(extent, gpu.properties, 0)
        if error == gpu.driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
            free, _ = torch.cuda.mem_get_info(gpu.index)
            raise MemoryError(f"{self.device} has no room for {size} bytes of weights; {free} are free")
        gpu.check("cuMemCreate", error)
        try:
            descriptor = gpu.call("cuMemExportToShareableHandle", handle, gpu.kind, 0)
            try:
                return descriptor, gpu.mapped(handle, size, extent, read_only=False)
            except BaseException:
                os.close(descriptor)
                raise
        finally:
            gpu.call("cuMemRelease", handle)  # the descriptor and the mapping keep the memory

    def open(self, descriptor: int, size: int) -> Tensor:
        """The memory of ``descriptor``, mapped for reading if the driver can: uint8 [size]."""
        gpu = _Gpu(self.device)
        handle = gpu.call("cuMemImportFromShareableHandle", descriptor, gpu.kind)
        try:
            return gpu.mapped(handle, size, gpu.extent(size), read_only=True)
        finally:
            gpu.call("cuMemRelease", handle)

    def complete(self) -> None:
        """Wait for copies to the device."""
        torch.cuda.synchronize(self.device)


class _Gpu:
    """The driver's calls for one device, which becomes current in this thread.

    Raises:
        NotShareable: the bindings are missing, or the device cannot export memory.
    """

    def __init__(self, device: torch.device) -> None:
        try:
            from cuda.bindings import driver
        except ImportError as error:
            raise NotShareable(
                f"that needs the package cuda-python, of the CUDA driver's major version: {error}"
            ) from error
        self.driver, self.device = driver, device
        self.index = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.set_device(self.index)
        torch.cuda.synchronize(self.index)  # makes the context
        self.kind = driver.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
        ordinal = self.call("cuDeviceGet", self.index)
        # By our own names: newer bindings have aliases, and report those.
        for name in ("VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED", "HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED"):
            attribute = getattr(driver.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
            if not self.call("cuDeviceGetAttribute", attribute, ordinal):
                raise NotShareable(f"{device} has no CU_DEVICE_ATTRIBUTE_{name}")
        self._place = driver.CUmemLocation()
        self._place.type, self._place.id = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE, self.index
        self.properties = driver.CUmemAllocationProp()
        self.properties.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        self.properties.location = self._place
        self.properties.requestedHandleTypes = self.kind

    def check(self, call: str, error: Any) -> None:
        if error != self.driver.CUresult.CUDA_SUCCESS:
            raise NotShareable(f"{call} on {self.device} failed: {error!r}")

    def call(self, name: str, *arguments: Any) -> Any:
        """Call the driver; its result, if it has one."""
        error, *values = getattr(self.driver, name)(*arguments)
        self.check(name, error)
        return values[0] if values else None

    def extent(self, size: int) -> int:
        """``size`` rounded up to the driver's granularity, in bytes."""
        minimum = self.driver.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
        granularity = int(self.call("cuMemGetAllocationGranularity", self.properties, minimum))
        return -(-size // granularity) * granularity

    def mapped(self, handle: Any, size: int, extent: int, read_only: bool) -> Tensor:
        """The first ``size`` of a handle's ``extent`` bytes; the mapping ends with the last tensor of it."""
        pointer = int(self.call("cuMemAddressReserve", extent, 0, 0, 0))
        try:
            self.call("cuMemMap", pointer, extent, 0, handle, 0)
            try:
                self._allow(pointer, extent, read_only)
                mapping = CudaBytes(self.device, pointer, size)
                contents = mapping.tensor()
            except BaseException:
                self.call("cuMemUnmap", pointer, extent)
                raise
        except BaseException:
            self.call("cuMemAddressFree", pointer, extent)
            raise
        weakref.finalize(mapping, self._unmap, pointer, extent).atexit = False
        return contents

    def _allow(self, pointer: int, extent: int, read_only: bool) -> None:
        access = self.driver.CUmemAccessDesc()
        access.location = self._place
        flags = self.driver.CUmemAccess_flags
        if read_only:
            access.flags = flags.CU_MEM_ACCESS_FLAGS_PROT_READ
            (error,) = self.driver.cuMemSetAccess(pointer, extent, [access], 1)
            if error == self.driver.CUresult.CUDA_SUCCESS:
                return
            log.info("%s maps weights for writing, too: read-only, cuMemSetAccess says %r", self.device, error)
        access.flags = flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        self.call("cuMemSetAccess", pointer, extent, [access], 1)

    def _unmap(self, pointer: int, extent: int) -> None:
        torch.cuda.synchronize(self.index)  # a kernel may still be reading
        self.call("cuMemUnmap", pointer, extent)
        self.call("cuMemAddressFree", pointer, extent)


def why_not(device: torch.device) -> str | None:
    """The reason that processes cannot share memory of ``device``, found by trying; None if they can."""
    memory = CudaMemory(device)
    try:
        descriptor, _ = memory.allocate(1)
        try:
            memory.open(descriptor, 1)
        finally:
            os.close(descriptor)
    except (NotShareable, MemoryError) as error:
        return str(error)
    return None


def device_uuid(device: torch.device) -> str:
    """A GPU's UUID, the same in every process; its index depends on the GPUs that are visible."""
    return str(torch.cuda.get_device_properties(device).uuid)


def device_of(uuid: str) -> torch.device | None:
    """The GPU with that UUID; None where it is not visible to this process."""
    for index in range(torch.cuda.device_count()):
        if device_uuid(torch.device("cuda", index)) == uuid:
            return torch.device("cuda", index)
    return None


class CudaBytes:
    """``size`` bytes at ``pointer`` on ``device``, which the caller frees."""

    def __init__(self, device: torch.device, pointer: int, size: int) -> None:
        self.device, self.pointer, self.size = device, pointer, size

    def tensor(self) -> Tensor:
        """The memory as uint8 [size]; not a copy, and it keeps this object alive."""
        return torch.as_tensor(self, device=self.device)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        # Bytes, because the interface has no bfloat16.
        return {"shape": (self.size,), "typestr": "|u1", "data": (self.pointer, False), "strides": None, "version": 3}
