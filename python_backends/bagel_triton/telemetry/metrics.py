"""The interface by which engines report measurements."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

# Upper bounds of the histograms' buckets, in seconds: from a decoded token to a large image on a CPU.
SECONDS: Sequence[float] = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000)


class Metrics(Protocol):
    """A sink for measurements. Names lack the server's prefix; calls must not block."""

    def gauge(self, name: str, value: float) -> None:
        """Set ``name`` to ``value``."""

    def count(self, name: str, amount: float = 1, **labels: str) -> None:
        """Add ``amount`` to ``name``."""

    def observe(self, name: str, seconds: float) -> None:
        """Add a duration to the histogram ``name``."""


class NoMetrics:
    """Ignores everything."""

    def gauge(self, name: str, value: float) -> None:
        """Do nothing."""

    def count(self, name: str, amount: float = 1, **labels: str) -> None:
        """Do nothing."""

    def observe(self, name: str, seconds: float) -> None:
        """Do nothing."""


class ChangedGauges:
    """Gauges that are set only when they change; engines update them at every step."""

    def __init__(self, metrics: Metrics, prefix: str) -> None:
        self._metrics, self._prefix, self._values = metrics, prefix, dict[str, float]()

    def __call__(self, name: str, value: float) -> None:
        """Set ``name``, behind the prefix, to ``value``."""
        if self._values.get(name) != value:
            self._values[name] = value
            self._metrics.gauge(f"{self._prefix}{name}", value)
