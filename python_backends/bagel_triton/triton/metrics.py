"""An engine's measurements as metrics of Triton."""

from __future__ import annotations

import itertools
import logging
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any

import triton_python_backend_utils as pb_utils

from bagel_triton.telemetry.metrics import METRIC_DEFS, SECONDS, Metric

log = logging.getLogger(__name__)


class TritonMetrics:
    """The metrics of ``measurers`` (names in ``METRIC_DEFS``), created at once.

    Does nothing if Triton's metrics are switched off. Each update crosses a process boundary,
    so a thread of its own makes them and no step waits.
    """

    def __init__(self, measurers: Sequence[str]) -> None:
        self._families: dict[str, Any] = {}  # kept: a metric vanishes when its family is collected
        self._metrics: dict[tuple[str, ...], Any] = {}
        self._known = {metric.name: metric for name in measurers for metric in METRIC_DEFS[name]}
        self._updates: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._updates.put(self._make_all)
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)
        self._thread.start()

    def gauge(self, name: str, value: float, **labels: str) -> None:
        """Set ``bagel_name`` to ``value``."""
        self._updates.put(lambda: self._metric(name, **labels).set(value))

    def count(self, name: str, amount: float = 1, **labels: str) -> None:
        """Add ``amount`` to ``bagel_name_total``."""
        self._updates.put(lambda: self._metric(name, **labels).increment(amount))

    def count_up_to(self, name: str, total: int, **labels: str) -> None:
        """Raise ``bagel_name_total`` to ``total``, which a process that was killed may have raised in part."""
        self._updates.put(lambda: self._count_up_to(self._metric(name, **labels), total))

    def observe(self, name: str, seconds: float) -> None:
        """Add ``seconds`` to the histogram ``bagel_name``."""
        self._updates.put(lambda: self._metric(name).observe(seconds))

    def close(self) -> None:
        """Make the updates that are queued, then stop.

        Metrics that outlive their model's ``finalize`` take its process down with a segmentation fault.
        """
        self._updates.put(None)
        self._thread.join()
        self._metrics.clear()
        self._families.clear()

    def _make_all(self) -> None:
        """Create every series: one that is missing until its first event has no rate before the second."""
        for metric in self._known.values():
            for values in itertools.product(*metric.labels.values()):
                self._metric(metric.name, **dict(zip(metric.labels, values, strict=True)))

    def _count_up_to(self, metric: Any, total: int) -> None:
        if (new := total - metric.value()) > 0:
            metric.increment(new)

    def _metric(self, name: str, **labels: str) -> Any:
        key = (name, *labels.values())
        if key not in self._metrics:
            metric = self._known[name]
            buckets = {"buckets": list(SECONDS)} if metric.kind == "histogram" else {}
            self._metrics[key] = self._family(metric).Metric(labels=labels, **buckets)
        return self._metrics[key]

    def _family(self, metric: Metric) -> Any:
        if metric.name not in self._families:
            kind = getattr(pb_utils.MetricFamily, metric.kind.upper())
            self._families[metric.name] = pb_utils.MetricFamily(metric.exposed, metric.meaning, kind)
        return self._families[metric.name]

    def _run(self) -> None:
        while (update := self._updates.get()) is not None:
            try:
                update()
            except pb_utils.TritonModelException as error:
                log.warning("metrics are off: %s", error)
                break
            except KeyError as error:
                log.warning("no such metric: %s", error)
        while update is not None:  # metrics are off: drain the queue
            update = self._updates.get()
