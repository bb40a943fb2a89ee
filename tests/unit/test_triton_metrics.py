"""An engine's measurements on their way to Triton, with a stand-in for Triton's own module."""

from __future__ import annotations

import gc
import importlib
import sys
import weakref
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest


class FakeMetric:
    """Knows what it was set to, and is one of ``alive`` as long as anybody holds it."""

    alive: ClassVar[weakref.WeakSet[Any]] = weakref.WeakSet()
    values: ClassVar[dict[str, float]] = {}

    def __init__(self, name: str) -> None:
        self._name = name
        FakeMetric.alive.add(self)

    def set(self, value: float) -> None:
        self.values[self._name] = value

    increment = observe = set


class FakeFamily:
    """A family of Triton's, which makes metrics."""

    COUNTER, GAUGE, HISTOGRAM = "counter", "gauge", "histogram"

    def __init__(self, name: str, description: str, kind: str) -> None:
        self._name = name
        FakeMetric.alive.add(self)

    def Metric(self, **_: object) -> FakeMetric:
        return FakeMetric(self._name)


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    pb_utils = SimpleNamespace(MetricFamily=FakeFamily, TritonModelException=OSError)
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", pb_utils)  # type: ignore[arg-type]
    yield importlib.import_module("bagel_triton.triton.metrics")
    del sys.modules["bagel_triton.triton.metrics"]


def test_updates_arrive_and_no_metric_outlives_the_end(module: ModuleType) -> None:
    metrics = module.TritonMetrics(["dit"])
    metrics.gauge("dit_active", 3)
    metrics.close()
    assert FakeMetric.values["bagel_dit_active"] == 3
    gc.collect()
    assert not FakeMetric.alive, "Triton's own would crash the process as it ends"
