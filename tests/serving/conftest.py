"""One server for all tests that only ask it things, and one whose metrics and traces are looked at."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.collector import Collector, collecting
from tests.support.serving import Server


@pytest.fixture(scope="session", autouse=True)
def no_gpu() -> Iterator[None]:
    """What is recorded was computed on a CPU; a server that is not told takes a GPU where it sees one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        yield


@pytest.fixture(scope="session")
def server(checkpoint_dir: Path) -> Iterator[Server]:
    """A server of the recorded cases' checkpoint; afterwards no lease is left."""
    with Server(checkpoint_dir) as running:
        yield running
        assert running.gauge("bagel_thinker_kv_leases") == 0
        assert running.gauge("bagel_thinker_kv_blocks_used") == 0


@pytest.fixture(scope="session")
def collector() -> Iterator[Collector]:
    """Takes the spans of ``observed``."""
    with collecting() as running:
        yield running


@pytest.fixture(scope="session")
def observed(checkpoint_dir: Path, collector: Collector) -> Iterator[Server]:
    """A server that has had no request before test_metrics.py, and sends its spans to ``collector`` at once."""
    environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url, "OTEL_BSP_SCHEDULE_DELAY": "200"}
    with Server(checkpoint_dir, environment=environment) as running:
        yield running
