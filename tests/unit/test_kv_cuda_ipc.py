"""Memory that passes between processes by handle, through a runtime that is none; types and constants are NVIDIA's."""

from __future__ import annotations

import ctypes
import sys
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from bagel_triton.kv.connectors import cuda_ipc
from bagel_triton.kv.connectors.base import ConnectorUnavailable
from bagel_triton.kv.connectors.cuda_ipc import CudaAllocation, CudaIpcConsumer
from bagel_triton.kv.lease import table_words
from bagel_triton.protocol.errors import LeaseError
from bagel_triton.protocol.messages import Branch, KVGeometry, KVHandle

GPU = torch.device("cuda:0")
FREE = 1 << 20
HANDLE = bytes(range(64))  # a zero comes first, and ends nothing


class FakeRuntime:
    """One device of ``FREE`` bytes; ``refused`` calls fail."""

    def __init__(self, bindings: Any) -> None:
        self._bindings, self.refused, self.calls = bindings, set[str](), list[str]()
        self.allocated: dict[int, int] = {}  # pointer to size
        self.opened: list[int] = []

    def __getattr__(self, name: str) -> Any:  # types, constants, and the names of errors
        return getattr(self._bindings, name)

    def _result(self, call: str) -> Any:
        self.calls.append(call)
        errors = self._bindings.cudaError_t
        return errors.cudaErrorInsufficientDriver if call in self.refused else errors.cudaSuccess

    def cudaSetDevice(self, device: int) -> tuple[Any]:
        assert device == 0
        return (self._result("cudaSetDevice"),)

    def cudaMalloc(self, size: int) -> tuple[Any, int | None]:
        if size > FREE:
            return self._bindings.cudaError_t.cudaErrorMemoryAllocation, None
        pointer = 0x7F0000000000 + len(self.allocated)
        self.allocated[pointer] = size
        return self._result("cudaMalloc"), pointer

    def cudaIpcGetMemHandle(self, pointer: int) -> tuple[Any, Any]:
        assert pointer in self.allocated
        handle = self._bindings.cudaIpcMemHandle_t()
        ctypes.memmove(handle.getPtr(), HANDLE, len(HANDLE))
        return self._result("cudaIpcGetMemHandle"), handle

    def cudaIpcOpenMemHandle(self, handle: Any, flags: int) -> tuple[Any, int | None]:
        assert flags == self._bindings.cudaIpcMemLazyEnablePeerAccess == 1
        assert ctypes.string_at(handle.getPtr(), len(HANDLE)) == HANDLE
        error = self._result("cudaIpcOpenMemHandle")
        if error != self._bindings.cudaError_t.cudaSuccess:
            return error, None
        self.opened.append(0x7E0000000000)
        return error, self.opened[-1]

    def cudaIpcCloseMemHandle(self, pointer: int) -> tuple[Any]:
        self.opened.remove(pointer)
        return (self._result("cudaIpcCloseMemHandle"),)


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> FakeRuntime:
    fake = FakeRuntime(pytest.importorskip("cuda.bindings.runtime"))
    bindings = ModuleType("cuda.bindings")
    bindings.runtime = fake  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: fake.calls.append(f"torch uses {device}"))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: fake.calls.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (FREE, FREE))
    monkeypatch.setattr(CudaAllocation, "tensor", lambda allocation: torch.ones(allocation.size, dtype=torch.uint8))
    return fake


def test_an_allocation_passes_by_its_handle_and_is_closed_by_its_reader(runtime: FakeRuntime) -> None:
    allocation = CudaAllocation.allocate(GPU, 1000)
    assert runtime.calls == ["torch uses cuda:0", "cudaSetDevice", "cudaMalloc", "synchronize"]
    handle = allocation.export()
    assert handle == HANDLE
    opened = CudaAllocation.open(GPU, handle, allocation.size)
    assert ([opened.pointer], opened.size) == (runtime.opened, 1000)
    runtime.calls.clear()
    opened.close()
    assert runtime.opened == []
    assert runtime.calls[-2:] == ["synchronize", "cudaIpcCloseMemHandle"]  # a copy may still be reading


def test_the_memory_is_shown_to_torch_as_bytes() -> None:
    shown = CudaAllocation(GPU, 0x7F0000000000, 24).__cuda_array_interface__
    assert (shown["shape"], shown["typestr"], shown["data"]) == (
        (24,),
        "|u1",
        (0x7F0000000000, False),
    )


def test_a_full_gpu_is_an_error_that_says_what_to_lower(runtime: FakeRuntime) -> None:
    message = f"cuda:0 has no room for {FREE + 1} bytes of contexts; {FREE} are free: lower kv_tokens"
    with pytest.raises(MemoryError, match=message):
        CudaAllocation.allocate(GPU, FREE + 1)


@pytest.mark.parametrize("call", ["cudaSetDevice", "cudaMalloc", "cudaIpcGetMemHandle", "cudaIpcOpenMemHandle"])
def test_a_call_that_fails_is_named_with_its_error(runtime: FakeRuntime, call: str) -> None:
    runtime.refused = {call}
    with pytest.raises(ConnectorUnavailable, match=f"{call} failed: cudaErrorInsufficientDriver"):
        CudaAllocation.open(GPU, CudaAllocation.allocate(GPU, 1000).export(), 1000)


def test_a_handle_of_another_length_is_refused(runtime: FakeRuntime) -> None:
    with pytest.raises(ConnectorUnavailable, match="a CUDA IPC handle has 64 bytes, not 63"):
        CudaAllocation.open(GPU, HANDLE[:63], 1000)
    assert runtime.calls == []


def _handle(geometry: KVGeometry, pool: str) -> KVHandle:
    return KVHandle("request", Branch.GEN, "cuda_ipc", pool, 1, 0, 1, (0,), 16, 16, geometry, 0.0)


def test_a_handle_of_a_pool_that_is_gone_leaves_the_mapping_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    geometry = KVGeometry(1, 1, 8, 16, "float32")
    mapped, gone = (_handle(geometry, pool) for pool in ("mapped", "gone"))

    class Words:
        array = np.zeros(table_words(), dtype=np.int64)

        @classmethod
        def open(cls, handle: KVHandle) -> Words:
            if handle.pool == "gone":
                raise LeaseError("gone")
            return cls()

    class Mapping:
        size, closed = 4096, False

        def tensor(self) -> torch.Tensor:
            return torch.zeros(self.size, dtype=torch.uint8)

        def close(self) -> None:
            self.closed = True

    mapping = Mapping()
    monkeypatch.setattr(cuda_ipc, "SharedWords", Words)
    monkeypatch.setattr(cuda_ipc, "_open", lambda handle: mapping)
    consumer = CudaIpcConsumer()
    store, _ = consumer.attach(mapped)
    with pytest.raises(LeaseError, match="gone"):
        consumer.attach(gone)
    assert not mapping.closed
    assert consumer.attach(mapped)[0] is store
