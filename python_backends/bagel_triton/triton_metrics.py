"""An engine's measurements as metrics of Triton."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import triton_python_backend_utils as pb_utils

from bagel_triton.engine.metrics import SECONDS

log = logging.getLogger(__name__)


class TritonMetrics:
    """Metrics ``bagel_NAME``, made on first use; silent where Triton has metrics switched off.

    Each update crosses a process boundary, so a thread of its own makes them: no step waits.
    """

    def __init__(self) -> None:
        self._families: dict[str, Any] = {}  # kept: Triton drops a metric whose family is collected
        self._metrics: dict[tuple[str, ...], Any] = {}
        self._updates: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)
        self._thread.start()

    def gauge(self, name: str, value: float) -> None:
        """``bagel_name`` is ``value`` now."""
        self._updates.put(lambda: self._metric(name, pb_utils.MetricFamily.GAUGE).set(value))

    def count(self, name: str, amount: float = 1, **labels: str) -> None:
        """``amount`` more of ``bagel_name_total``."""
        kind = pb_utils.MetricFamily.COUNTER
        self._updates.put(lambda: self._metric(f"{name}_total", kind, labels).increment(amount))

    def observe(self, name: str, seconds: float) -> None:
        """``bagel_name`` took ``seconds`` once."""
        self._updates.put(lambda: self._metric(name, pb_utils.MetricFamily.HISTOGRAM).observe(seconds))

    def close(self) -> None:
        """Make the updates that are queued, then stop."""
        self._updates.put(None)
        self._thread.join()

    def _metric(self, name: str, kind: Any, labels: Mapping[str, str] = MappingProxyType({})) -> Any:
        key = (name, *labels.values())
        if key not in self._metrics:
            if name not in self._families:
                self._families[name] = pb_utils.MetricFamily(f"bagel_{name}", name.replace("_", " "), kind)
            buckets = {"buckets": list(SECONDS)} if kind == pb_utils.MetricFamily.HISTOGRAM else {}
            self._metrics[key] = self._families[name].Metric(labels=dict(labels), **buckets)
        return self._metrics[key]

    def _run(self) -> None:
        while (update := self._updates.get()) is not None:
            try:
                update()
            except pb_utils.TritonModelException as error:
                log.warning("metrics are off: %s", error)
                break
        while update is not None:  # nobody listens, and nothing may pile up
            update = self._updates.get()
