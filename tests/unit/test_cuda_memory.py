"""The order of the driver's calls, and what is left where one fails; the driver is one made of files."""

from __future__ import annotations

import gc
import os
import secrets
import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor

from bagel_triton.ipc import cuda_memory
from bagel_triton.ipc.cuda_memory import CudaBytes, CudaMemory, NotShareable, why_not
from bagel_triton.serving import memory
from bagel_triton.weights.sharing import DeviceWeights
from tests.support.fake_cuda_driver import CAPACITY, GRANULARITY, FakeCudaDriver
from tests.support.leaks import descriptors
from tests.support.weights import FILES, sources

GPU = torch.device("cuda:0")
NOTHING = (0, 0, 0)


@pytest.fixture(params=["plain types", "NVIDIA's types"])
def driver(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> FakeCudaDriver:
    types = pytest.importorskip("cuda.bindings.driver") if request.param == "NVIDIA's types" else None
    fake, bindings = FakeCudaDriver(types), ModuleType("cuda.bindings")
    bindings.driver = fake  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda index: fake.calls.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (CAPACITY, CAPACITY))
    monkeypatch.setattr(CudaBytes, "tensor", lambda mapping: fake.bytes_at(mapping.pointer, mapping.size, mapping))
    monkeypatch.setattr(cuda_memory, "device_uuid", lambda device: f"GPU-of-{device}")
    return fake


def numbers(size: int) -> Tensor:
    return (torch.arange(size) % 251).to(torch.uint8)


def test_what_one_process_writes_another_reads_after_its_end(driver: FakeCudaDriver) -> None:
    memory, before = CudaMemory(GPU), descriptors()
    descriptor, contents = memory.allocate(1000)
    contents.copy_(numbers(1000))
    assert driver.left == (0, 1, 1)
    del contents
    assert driver.left == NOTHING
    opened = memory.open(descriptor, 1000)
    os.close(descriptor)
    assert torch.equal(opened, numbers(1000))
    assert driver.left == (0, 1, 1)
    view = opened[10:20]
    del opened
    assert driver.left == (0, 1, 1)
    assert torch.equal(view, numbers(1000)[10:20])
    del view
    assert (driver.left, descriptors() - before) == (NOTHING, set())


def test_a_mapping_ends_after_the_kernels_that_read_it(driver: FakeCudaDriver) -> None:
    descriptor, contents = CudaMemory(GPU).allocate(1)
    os.close(descriptor)
    driver.calls.clear()
    del contents
    assert driver.calls == ["synchronize", "cuMemUnmap", "cuMemAddressFree"]


@pytest.mark.parametrize("size", [1, GRANULARITY - 1, GRANULARITY, GRANULARITY + 1])
def test_any_size_is_allocated_and_opened(driver: FakeCudaDriver, size: int) -> None:
    descriptor, contents = CudaMemory(GPU).allocate(size)
    opened = CudaMemory(GPU).open(descriptor, size)
    os.close(descriptor)
    assert contents.numel() == opened.numel() == size


@pytest.mark.parametrize("granted", [True, False])
def test_weights_are_mapped_read_only_where_the_driver_does_that(driver: FakeCudaDriver, granted: bool) -> None:
    driver.read_only = granted
    descriptor, written = CudaMemory(GPU).allocate(10)
    written.copy_(numbers(10))
    opened = CudaMemory(GPU).open(descriptor, 10)
    os.close(descriptor)
    assert torch.equal(opened, numbers(10))
    assert list(driver.access.values()) == [3, 1 if granted else 3]


@pytest.mark.parametrize(
    "call",
    [
        "cuDeviceGet",
        "cuDeviceGetAttribute",
        "cuMemGetAllocationGranularity",
        "cuMemCreate",
        "cuMemExportToShareableHandle",
        "cuMemAddressReserve",
        "cuMemMap",
        "cuMemSetAccess",
    ],
)
def test_a_call_that_fails_while_allocating_leaves_nothing(driver: FakeCudaDriver, call: str) -> None:
    before = descriptors()
    driver.refused = {call}
    message = f"{call} on cuda:0 failed: .*CUDA_ERROR_NOT_SUPPORTED"
    with pytest.raises(NotShareable, match=message) as error:
        CudaMemory(GPU).allocate(1000)
    assert (driver.left, descriptors() - before) == (NOTHING, set())
    assert why_not(GPU) == str(error.value)


@pytest.mark.parametrize(
    "call", ["cuMemImportFromShareableHandle", "cuMemAddressReserve", "cuMemMap", "cuMemSetAccess"]
)
def test_a_call_that_fails_while_opening_leaves_nothing(driver: FakeCudaDriver, call: str) -> None:
    gc.collect()  # descriptors of earlier tests
    before = descriptors()
    descriptor, contents = CudaMemory(GPU).allocate(1000)
    driver.refused = {call}
    with pytest.raises(NotShareable, match=f"{call} on cuda:0 failed"):
        CudaMemory(GPU).open(descriptor, 1000)
    assert driver.left == (0, 1, 1)
    os.close(descriptor)
    del contents
    assert (driver.left, descriptors() - before) == (NOTHING, set())
    if call == "cuMemImportFromShareableHandle":
        assert "cuMemImportFromShareableHandle" in (why_not(GPU) or "")
        gc.collect()
        assert (driver.left, descriptors() - before) == (NOTHING, set())


def test_a_device_that_can_is_found_so_and_keeps_nothing(driver: FakeCudaDriver) -> None:
    before = descriptors()
    assert why_not(GPU) is None
    assert memory._ask_device(GPU) == (CAPACITY, None, CAPACITY)
    assert (driver.left, descriptors() - before) == (NOTHING, set())


@pytest.mark.parametrize(
    ("attribute", "name"),
    [(102, "VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED"), (103, "HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED")],
)
def test_a_device_that_cannot_says_what_it_lacks(driver: FakeCudaDriver, attribute: int, name: str) -> None:
    driver.lacking = {attribute}
    # One of the attributes has two names, of which versions of the bindings show either.
    shown = (why_not(GPU) or "").replace("VIRTUAL_ADDRESS_M", "VIRTUAL_MEMORY_M")
    assert shown == f"cuda:0 has no CU_DEVICE_ATTRIBUTE_{name}"


def test_without_the_bindings_the_package_is_named(driver: FakeCudaDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    assert "needs the package cuda-python, of the CUDA driver's major version" in (why_not(GPU) or "")


def test_a_full_device_is_an_error_of_its_own(driver: FakeCudaDriver) -> None:
    size = CAPACITY + 1
    message = f"cuda:0 has no room for {size} bytes of weights; {CAPACITY} are free"
    with pytest.raises(MemoryError, match=message):
        CudaMemory(GPU).allocate(size)
    assert driver.left == NOTHING


def test_weights_lie_aligned_in_it_and_their_copies_complete(driver: FakeCudaDriver) -> None:
    prefix, before = f"bagel_triton_test_{os.getpid()}_{secrets.token_hex(4)}", descriptors()
    weights = DeviceWeights(prefix, CudaMemory(GPU))
    found, expected = weights.converted(sources(), torch.float32, FILES), sources()
    assert weights.device == GPU
    assert all(torch.equal(found[name], expected[name].float()) for name in expected)
    assert len({tensor.data_ptr() % 512 for tensor in found.values()}) == 1
    written = driver.calls.index("cuMemSetAccess")
    # Once for the copies, once for the end of the mapping that they went through.
    assert driver.calls[written : driver.calls.index("cuMemUnmap")].count("synchronize") == 2
    assert driver.left == (0, 1, 1)
    weights.close()
    del found
    assert (driver.left, descriptors() - before) == (NOTHING, set())
