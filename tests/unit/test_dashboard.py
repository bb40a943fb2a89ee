"""The dashboard and the documentation name the metrics there are, and no other."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from bagel_triton.openai.request_log import HttpMetrics
from bagel_triton.telemetry.metrics import METRIC_DEFS

DOCS = Path(__file__).parents[2] / "docs"
METRICS = {metric.exposed: metric for metrics in METRIC_DEFS.values() for metric in metrics}
# Triton's own, as it documents them; those of a GPU show only where there is one.
TRITONS = {
    "nv_inference_request_success",
    "nv_inference_request_failure",
    "nv_inference_pending_request_count",
    "nv_cpu_utilization",
    "nv_cpu_memory_used_bytes",
    "nv_gpu_utilization",
    "nv_gpu_memory_used_bytes",
}


@pytest.fixture(scope="module")
def dashboard() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((DOCS / "grafana" / "bagel-triton.json").read_text())
    return loaded


@pytest.fixture(scope="module")
def expressions(dashboard: dict[str, Any]) -> list[str]:
    return [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]


def _names(expression: str) -> list[str]:
    """The series in an expression, without the labels' values."""
    return re.findall(r"\b(?:bagel|nv)_\w+", re.sub(r'"[^"]*"', '""', expression))


def _series(text: str) -> set[str]:
    return set(_names(text))


def test_every_series_of_the_dashboard_exists(expressions: list[str]) -> None:
    series = {
        metric.exposed + suffix
        for metric in METRICS.values()
        for suffix in (("_bucket", "_sum", "_count") if metric.kind == "histogram" else ("",))
    }
    assert _series("\n".join(expressions)) <= series | TRITONS


def test_no_metric_is_left_out_of_the_dashboard(expressions: list[str]) -> None:
    shown = {re.sub("_(bucket|sum|count)$", "", name) for name in _series("\n".join(expressions))}
    assert METRICS.keys() - shown == set()


def test_every_panel_queries_the_chosen_source_for_the_chosen_servers(
    dashboard: dict[str, Any], expressions: list[str]
) -> None:
    assert [variable["name"] for variable in dashboard["templating"]["list"]] == ["datasource", "instance"]
    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    assert {panel["datasource"]["uid"] for panel in panels} == {"${datasource}"}
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    for expression in expressions:
        assert len(re.findall(r'{instance=~"\$instance"[,}]', expression)) == len(_names(expression)), expression


def test_a_rate_is_of_a_counter_and_a_quantile_of_a_histogram(expressions: list[str]) -> None:
    for expression in expressions:
        for name in re.findall(r"rate\((bagel_\w+)", expression):
            assert name.endswith(("_total", "_bucket", "_sum")), expression
        assert ("histogram_quantile" in expression) == ("_bucket" in expression), expression


def test_the_documentation_has_every_metric_and_its_kind() -> None:
    rows = dict(re.findall(r"^\| `(bagel_\w+)[^`]*` \| (\w+)", (DOCS / "observability.md").read_text(), re.MULTILINE))
    api = HttpMetrics()
    api.requests.labels("GET", "/health", "200").inc()  # a labelled metric is on the page from its first use
    api.seconds.labels("/health").observe(0.1)
    http = dict(re.findall(r"^# TYPE (\w+) (\w+)$", api.page().decode(), re.MULTILINE))
    http = {name: kind for name, kind in http.items() if not name.endswith("_created")}
    assert rows == {name: metric.kind for name, metric in METRICS.items()} | http
