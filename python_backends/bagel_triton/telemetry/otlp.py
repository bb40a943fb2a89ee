"""Sends spans over OTLP/HTTP by OpenTelemetry's SDK; imported only where traces are on."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence

import requests
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExportResult

from bagel_triton.telemetry.tracing import Tracing

CLOSE_S = 1.5  # tritonserver itself waits two seconds for requests in flight
log = logging.getLogger(__name__)


def exporting() -> Tracing:
    """Tracing whose spans a thread of the SDK sends in batches; spans beyond its queue are dropped.

    No request waits for a collector. Endpoint, headers, sampling, batching and the service's
    name are the SDK's own environment variables.
    """
    named = OTELResourceDetector().detect().attributes.get(SERVICE_NAME, "bagel-triton")
    provider = TracerProvider(resource=Resource.create({SERVICE_NAME: named}), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(_Exporter()))

    def shutdown() -> None:
        # The SDK's own shutdown waits as long as a silent collector lets it wait.
        closing = threading.Thread(target=provider.shutdown, name="tracing-close", daemon=True)
        closing.start()
        closing.join(CLOSE_S)

    return Tracing(provider, shutdown)


class _Exporter(OTLPSpanExporter):
    """The SDK's exporter; logs once that the collector is gone, and once that it is back."""

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
