"""When requests are traced, what of a client's headers goes on, and what a bad collector costs."""

from __future__ import annotations

import logging
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from bagel_triton.protocol.errors import InvalidRequest, StageUnavailable
from bagel_triton.telemetry import tracing
from tests.support.collector import Collector, collecting

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE}-{PARENT}-01"
ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({ENDPOINT: ""}, None),
        ({ENDPOINT: "http://c:4318"}, "http://c:4318"),
        ({ENDPOINT: "http://c:4318", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://t/v1/traces"}, "http://t/v1/traces"),
        ({ENDPOINT: "http://c:4318", "OTEL_SDK_DISABLED": "TRUE"}, None),
        ({ENDPOINT: "http://c:4318", "OTEL_TRACES_EXPORTER": "none"}, None),
    ],
)
def test_the_standard_variables_switch_traces_on_and_off(environment: dict[str, str], expected: str | None) -> None:
    assert tracing.endpoint(environment) == expected


def test_without_a_collector_no_sdk_is_loaded() -> None:
    code = f"""if True:
        import sys
        from bagel_triton.telemetry import tracing
        with tracing.from_environment().request({{"traceparent": "{TRACEPARENT}"}}) as span:
            with span.child("dit", 0.0):
                pass
        print(any(name.startswith(("opentelemetry.sdk", "opentelemetry.exporter")) for name in sys.modules))
    """
    ran = subprocess.run([sys.executable, "-c", code], env={}, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "False"


def test_without_the_library_requests_are_served_untraced(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(ENDPOINT, "http://127.0.0.1:9")
    monkeypatch.setitem(sys.modules, "bagel_triton.telemetry.otlp", None)
    with caplog.at_level(logging.WARNING), tracing.from_environment().request({}) as span:
        span.set_attributes({"height": 64})
    assert "traces are off: the extra bagel-triton[tracing] is not installed" in caplog.text
    assert tracing.destination() == "nowhere: the extra bagel-triton[tracing] is not installed"


@pytest.mark.parametrize(
    ("parents", "states", "expected"),
    [
        ([TRACEPARENT], [], {"traceparent": TRACEPARENT}),
        ([TRACEPARENT], ["a=1", "b=2"], {"traceparent": TRACEPARENT, "tracestate": "a=1,b=2"}),
        ([TRACEPARENT], ["x" * 600], {"traceparent": TRACEPARENT}),
        ([TRACEPARENT], ["a=\u00e9"], {"traceparent": TRACEPARENT}),
        ([f"{TRACEPARENT}-later"], [], {"traceparent": f"{TRACEPARENT}-later"}),
        ([], ["a=1"], {}),
        (["00-x"], ["a=1"], {}),
        ([TRACEPARENT.upper()], [], {}),
        ([f"{TRACEPARENT}\u00e9"], [], {}),
        ([TRACEPARENT, TRACEPARENT], [], {}),
    ],
)
def test_only_what_the_standard_allows_goes_on(parents: list[str], states: list[str], expected: dict[str, str]) -> None:
    assert tracing.passed_on(parents, states) == expected


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    with collecting() as running:
        monkeypatch.setenv(ENDPOINT, running.url)
        yield running


def test_what_a_request_failed_of_is_in_its_spans_and_only_the_servers_failures_are_errors(
    collector: Collector,
) -> None:
    traces = tracing.from_environment()
    for error in (InvalidRequest("no", "height"), StageUnavailable("dit died"), ZeroDivisionError("by zero")):
        request = traces.request({"traceparent": TRACEPARENT})
        with pytest.raises(type(error)), request as span, span.child("dit", time.time()):
            raise error
    traces.close()
    expected = [("InvalidRequest", 400, False), ("StageUnavailable", 503, True), ("Internal", 500, True)]
    for name in ("dit", "bagel"):
        spans = [span for span in collector.of(TRACE) if span.name == name]
        seen = [(s.attributes["error.type"], s.attributes["bagel.status"], s.failed) for s in spans]
        assert seen == expected


def test_the_services_name_is_the_deployments_if_it_gives_one(
    collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "service.name=images")
    traces = tracing.from_environment()
    with traces.request({}):
        pass
    traces.close()
    assert [span.service for span in collector.spans] == ["images"]


@pytest.mark.parametrize("refuses", [False, True], ids=["hangs", "refuses connections"])
def test_a_collector_that_is_not_well_costs_no_time(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, refuses: bool
) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "10")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        monkeypatch.setenv(ENDPOINT, f"http://{address}")
        if refuses:
            listener.close()
        traces = tracing.from_environment()
        started = time.monotonic()
        for number in range(200):
            with traces.request({}) as span, span.child("dit", time.time()):
                span.set_attributes({"number": number})
        assert time.monotonic() - started < 5.0
        time.sleep(0.1)
        started = time.monotonic()
        traces.close()
        assert time.monotonic() - started < 5.0
    assert caplog.text.count(f"spans are lost, the collector at http://{address}") == (1 if refuses else 0)
    assert "Traceback" not in caplog.text
