"""Captures of CUDA graphs by engines that share a process and a device, with CUDA's own rules on one that is none."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from bagel_triton.model.cuda.graphs import MAX_GRAPHS, GraphCache
from bagel_triton.model.device import is_lost

CPU = torch.device("cpu")
REFUSED = "operation not permitted when stream is capturing"


class Device:
    """``torch.cuda``: a wait for the device fails while it is captured, and so does that capture's end."""

    def __init__(self) -> None:
        self.captures, self.spoilt, self.pools = 0, False, 0

    def synchronize(self, device: Any = None) -> None:
        if self.captures:
            self.spoilt = True
            raise RuntimeError(REFUSED)

    @contextlib.contextmanager
    def graph(self, captured: Any, **options: Any) -> Iterator[None]:
        self.synchronize()
        self.captures += 1
        try:
            yield
        finally:
            self.captures -= 1
            if self.spoilt:
                raise RuntimeError("operation failed due to a previous error during capture")

    def new_pool(self) -> tuple[int, int]:
        self.pools += 1
        return 0, self.pools


class Graph:
    """``torch.cuda.CUDAGraph``."""

    def replay(self) -> None: ...


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    device = Device()
    monkeypatch.setattr(torch.cuda, "synchronize", device.synchronize)
    monkeypatch.setattr(torch.cuda, "graph", device.graph)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", device.new_pool)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: torch.cuda.Stream)
    monkeypatch.setattr(torch.cuda.Stream, "synchronize", lambda *of: None)
    return device


def slow(device: Device, inside: threading.Event) -> Callable[[int, Tensor], tuple[Tensor]]:
    """A step that takes a while to capture."""

    def step(key: int, inputs: Tensor) -> tuple[Tensor]:
        if device.captures:
            inside.set()
            time.sleep(0.2)
        return (inputs,)

    return step


def graphs_of(cache: GraphCache[int]) -> int:
    return sum(met.graph is not None for met in cache._met.values())


def test_two_engines_capture_one_after_the_other(device: Device) -> None:
    inside = threading.Event()
    one, other = (GraphCache[int](CPU, slow(device, inside)) for _ in range(2))
    for cache in (one, other):
        cache.run(1, [1])
    with ThreadPoolExecutor(1) as thread:
        first = thread.submit(one.run, 1, [1])
        assert inside.wait(10)
        other.run(1, [1])
        first.result()
    assert graphs_of(one) == graphs_of(other) == 1


def test_a_device_is_not_taken_for_lost_while_another_engine_captures(device: Device) -> None:
    inside = threading.Event()
    cache = GraphCache[int](CPU, slow(device, inside))
    cache.run(1, [1])
    with ThreadPoolExecutor(1) as thread:
        first = thread.submit(cache.run, 1, [1])
        assert inside.wait(10)
        assert not is_lost(torch.device("cuda:0"))
        first.result()
    assert graphs_of(cache) == 1


def test_a_pool_of_memory_ends_with_its_last_graph(device: Device) -> None:
    cache = GraphCache[int](CPU, lambda key, inputs: (inputs,))
    for _ in range(2):
        cache.run(-1, [1])
    cache.run(-2, [1])
    cache.run(-2, [1])
    assert (graphs_of(cache), device.pools) == (2, 1)
    for key in range(MAX_GRAPHS):  # each once, so none is captured
        cache.run(key, [1])
    assert graphs_of(cache) == 0
    cache.run(0, [1])
    assert (graphs_of(cache), device.pools) == (1, 2)


def test_the_first_error_of_a_failed_capture_is_in_the_log(device: Device, caplog: pytest.LogCaptureFixture) -> None:
    def step(key: int, inputs: Tensor) -> tuple[Tensor]:
        if device.captures:
            device.synchronize()
        return (inputs,)

    cache = GraphCache[int](CPU, step)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            cache.run(1, [1])
    assert graphs_of(cache) == 0
    assert [REFUSED in record.exc_text for record in caplog.records if record.exc_text] == [True]
