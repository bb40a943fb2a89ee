"""A fake CUDA driver whose virtual memory management works on files in memory.

It has the names, the arguments and the results of NVIDIA's ``cuda.bindings.driver``, and takes
its types if it is installed.
"""

from __future__ import annotations

import enum
import itertools
import mmap
import os
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

GRANULARITY = 1 << 16
CAPACITY = 1 << 24


class CUresult(enum.IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_NOT_SUPPORTED = 801


class FakeCudaDriver:
    """One device with its allocations, reservations and mappings; ``refused`` calls fail.

    ``bindings`` is NVIDIA's module, whose enumerations and structures are then used.
    """

    CUresult = CUresult
    CUdevice_attribute = enum.IntEnum(
        "CUdevice_attribute",
        {
            "CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED": 102,
            "CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED": 103,
        },
    )
    CUmemAllocationHandleType = SimpleNamespace(CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR=1)
    CUmemAllocationType = SimpleNamespace(CU_MEM_ALLOCATION_TYPE_PINNED=1)
    CUmemLocationType = SimpleNamespace(CU_MEM_LOCATION_TYPE_DEVICE=1)
    CUmemAccess_flags = SimpleNamespace(CU_MEM_ACCESS_FLAGS_PROT_READ=1, CU_MEM_ACCESS_FLAGS_PROT_READWRITE=3)
    CUmemAllocationGranularity_flags = SimpleNamespace(CU_MEM_ALLOC_GRANULARITY_MINIMUM=0)
    CUmemAllocationProp = CUmemLocation = CUmemAccessDesc = SimpleNamespace

    def __init__(self, bindings: Any = None) -> None:
        for name in dir(type(self)) if bindings is not None else ():
            if name.startswith("CU"):
                setattr(self, name, getattr(bindings, name))
            elif name.startswith("cu"):
                assert callable(getattr(bindings, name))
        self.refused: set[str] = set()
        self.lacking: set[int] = set()
        self.read_only = True
        self.calls: list[str] = []
        self.handles: dict[int, int] = {}  # to a descriptor
        self.reserved: dict[int, int] = {}  # address to size
        self.mapped: dict[int, tuple[int, int]] = {}  # address to a descriptor and size
        self.access: dict[int, int] = {}
        self._numbers = itertools.count(1)

    @property
    def left(self) -> tuple[int, int, int]:
        """How many handles, reservations and mappings there are."""
        return len(self.handles), len(self.reserved), len(self.mapped)

    def _call(self, name: str) -> int:
        self.calls.append(name)
        return self.CUresult.CUDA_ERROR_NOT_SUPPORTED if name in self.refused else self.CUresult.CUDA_SUCCESS

    def _new(self, descriptor: int) -> int:
        handle = next(self._numbers)
        self.handles[handle] = descriptor
        return handle

    def cuDeviceGet(self, ordinal: int) -> tuple[int, int]:
        return self._call("cuDeviceGet"), ordinal

    def cuDeviceGetAttribute(self, attribute: int, device: int) -> tuple[int, int]:
        return self._call("cuDeviceGetAttribute"), int(attribute not in self.lacking)

    def cuMemGetAllocationGranularity(self, properties: Any, option: int) -> tuple[int, int]:
        return self._call("cuMemGetAllocationGranularity"), GRANULARITY

    def cuMemCreate(self, size: int, properties: Any, flags: int) -> tuple[int, int | None]:
        assert size % GRANULARITY == flags == 0
        assert properties.requestedHandleTypes == 1
        if size > CAPACITY:
            return self.CUresult.CUDA_ERROR_OUT_OF_MEMORY, None
        if error := self._call("cuMemCreate"):
            return error, None
        descriptor = os.memfd_create("cuda")
        os.ftruncate(descriptor, size)
        return self.CUresult.CUDA_SUCCESS, self._new(descriptor)

    def cuMemExportToShareableHandle(self, handle: int, kind: int, flags: int) -> tuple[int, int | None]:
        if error := self._call("cuMemExportToShareableHandle"):
            return error, None
        return self.CUresult.CUDA_SUCCESS, os.dup(self.handles[handle])

    def cuMemImportFromShareableHandle(self, descriptor: int, kind: int) -> tuple[int, int | None]:
        if error := self._call("cuMemImportFromShareableHandle"):
            return error, None
        return self.CUresult.CUDA_SUCCESS, self._new(os.dup(descriptor))

    def cuMemRelease(self, handle: int) -> tuple[int]:
        os.close(self.handles.pop(handle))
        return (self._call("cuMemRelease"),)

    def cuMemAddressReserve(self, size: int, alignment: int, hint: int, flags: int) -> tuple[int, int | None]:
        assert size % GRANULARITY == alignment == hint == flags == 0
        if error := self._call("cuMemAddressReserve"):
            return error, None
        address = next(self._numbers) << 32
        self.reserved[address] = size
        return self.CUresult.CUDA_SUCCESS, address

    def cuMemMap(self, address: int, size: int, offset: int, handle: int, flags: int) -> tuple[int]:
        assert size == self.reserved[address] == os.fstat(self.handles[handle]).st_size
        if error := self._call("cuMemMap"):
            return (error,)
        self.mapped[address] = os.dup(self.handles[handle]), size
        return (self.CUresult.CUDA_SUCCESS,)

    def cuMemSetAccess(self, address: int, size: int, wanted: list[Any], count: int) -> tuple[int]:
        (access,) = wanted
        assert (size, count) == (self.mapped[address][1], 1)
        error = self._call("cuMemSetAccess")
        if error or (access.flags == 1 and not self.read_only):
            return (self.CUresult.CUDA_ERROR_NOT_SUPPORTED,)
        self.access[address] = access.flags
        return (self.CUresult.CUDA_SUCCESS,)

    def cuMemUnmap(self, address: int, size: int) -> tuple[int]:
        descriptor, mapped = self.mapped.pop(address)
        assert mapped == size
        os.close(descriptor)
        return (self._call("cuMemUnmap"),)

    def cuMemAddressFree(self, address: int, size: int) -> tuple[int]:
        assert self.reserved.pop(address) == size
        assert address not in self.mapped
        return (self._call("cuMemAddressFree"),)

    def bytes_at(self, address: int, size: int, owner: object) -> Tensor:
        """What is mapped there, if it may be accessed: uint8 [size]; a tensor of it keeps ``owner``."""

        class Owned(mmap.mmap):
            pass

        assert self.access[address] in (1, 3)
        contents = Owned(self.mapped[address][0], self.mapped[address][1])
        contents.owner = owner  # type: ignore[attr-defined]
        return torch.frombuffer(contents, dtype=torch.uint8, count=size)
