"""Spans by OpenTelemetry, sent over OTLP/HTTP; imported only where traces are on."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import requests
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace import Span, SpanKind, StatusCode, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

import bagel_triton
from bagel_triton.protocol.errors import Cancelled, from_exception
from bagel_triton.telemetry.spans import Attributes
from bagel_triton.telemetry.tracing import HEADERS, REQUEST_ID

CLOSE_S = 1.5  # tritonserver itself waits two seconds for what is left
log = logging.getLogger(__name__)


class OpenTelemetryTracing:
    """Spans are sent by a thread of the SDK's, in batches; what it cannot keep up with is dropped.

    No request waits for a collector. Endpoint, headers, sampling, batching and the service's
    name are the SDK's own environment variables.
    """

    def __init__(self, exporter: SpanExporter | None = None) -> None:
        named = OTELResourceDetector().detect().attributes.get(SERVICE_NAME, "bagel-triton")
        self._provider = TracerProvider(resource=Resource.create({SERVICE_NAME: named}), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter or _Exporter()))
        self._tracer = self._provider.get_tracer("bagel_triton", bagel_triton.__version__)
        self._headers = TraceContextTextMapPropagator()

    @contextmanager
    def request(self, carrier: Mapping[str, Any]) -> Iterator[_Span]:
        """A request's span; a malformed parent is none."""
        given = {name.lower(): str(value) for name, value in carrier.items() if name.lower() in HEADERS}
        # Into an empty context: the parent is the one given and no other.
        parent = self._headers.extract(given, context=Context())
        span = self._tracer.start_span("bagel", context=parent, kind=SpanKind.SERVER)
        if (request_id := given.get(REQUEST_ID)) is not None:
            span.set_attribute("bagel.http_request_id", request_id)
        with _ended(self._tracer, span) as within:
            yield within
            within.set_attributes({"status": 200})

    def close(self) -> None:
        """Send what is left, within ``CLOSE_S``."""
        # Its own shutdown waits as long as a collector that does not answer lets it wait.
        closing = threading.Thread(target=self._provider.shutdown, name="tracing-close", daemon=True)
        closing.start()
        closing.join(CLOSE_S)


class _Span:
    """A span that is under way."""

    def __init__(self, tracer: Tracer, span: Span) -> None:
        self._tracer, self._span = tracer, span

    def set_attributes(self, attributes: Attributes) -> None:
        self._span.set_attributes({f"bagel.{name}": value for name, value in attributes.items()})

    @contextmanager
    def child(self, name: str, started_at: float) -> Iterator[_Span]:
        parent = set_span_in_context(self._span, Context())
        span = self._tracer.start_span(name, context=parent, start_time=int(started_at * 1e9))
        with _ended(self._tracer, span) as within:
            yield within

    def fail(self, error: BaseException) -> None:
        """Say what it failed of; only a defect or a limit of the server counts as its error."""
        typed = Cancelled("given up") if isinstance(error, GeneratorExit) else from_exception(error)
        self._span.set_attribute("error.type", typed.kind)
        self.set_attributes({"status": typed.http_status, "error": typed.message})
        if typed.http_status >= 500:
            self._span.set_status(StatusCode.ERROR, typed.message)


@contextmanager
def _ended(tracer: Tracer, span: Span) -> Iterator[_Span]:
    within = _Span(tracer, span)
    try:
        yield within
    except BaseException as error:
        within.fail(error)
        raise
    finally:
        span.end()


class _Exporter(OTLPSpanExporter):
    """The SDK's, which says once that its collector is gone, and once that it is back."""

    _lost = False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        try:
            result = super().export(spans)
            reason = "it refuses them"
        except requests.RequestException as error:
            result, reason = SpanExportResult.FAILURE, str(error)
        lost = result is not SpanExportResult.SUCCESS
        if lost and not self._lost:
            log.warning("spans are lost, the collector at %s does not take them: %s", self._endpoint, reason)
        elif self._lost and not lost:
            log.info("the collector at %s takes spans again", self._endpoint)
        self._lost = lost
        return result
