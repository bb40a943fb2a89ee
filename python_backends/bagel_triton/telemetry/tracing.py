"""Traces of requests, on OpenTelemetry's API, whose no-op tracer stands in where traces are off.

The switches are the standard ones: an ``OTEL_EXPORTER_OTLP_*ENDPOINT`` turns traces on, and
``OTEL_SDK_DISABLED=true`` or ``OTEL_TRACES_EXPORTER=none`` off again. The SDK, which sends the
spans, is in :mod:`bagel_triton.telemetry.otlp` and needs the extra ``tracing``.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import SpanKind, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

import bagel_triton
from bagel_triton.protocol.errors import Cancelled, from_exception
from bagel_triton.protocol.messages import Answer, FlowSettings, Plan

# https://www.w3.org/TR/trace-context/
PARENT, STATE = "traceparent", "tracestate"
REQUEST_ID = "x-request-id"  # of the HTTP API's log
HEADERS = (PARENT, STATE, REQUEST_ID)
ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
MAX_STATE = 512  # characters that the standard wants passed on
MISSING = "the extra bagel-triton[tracing] is not installed"
_PARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}(-[!-~]{0,256})?")
_STATE = re.compile(r"[ -~]+")
log = logging.getLogger(__name__)

Attributes = Mapping[str, str | int | float | bool]


class Span:
    """A stretch of a request's time; without arguments one that records nothing. Calls neither block nor fail."""

    def __init__(self, tracer: trace.Tracer | None = None, span: trace.Span = trace.INVALID_SPAN) -> None:
        self._tracer, self._span = tracer or trace.NoOpTracer(), span

    def set_attributes(self, attributes: Attributes) -> None:
        """Set attributes, under names that begin with ``bagel.``."""
        self._span.set_attributes({f"bagel.{name}": value for name, value in attributes.items()})

    @contextmanager
    def child(self, name: str, started_at: float) -> Iterator[Span]:
        """A span within this one, from ``started_at`` (Unix seconds) to the block's end.

        An exception that leaves the block is recorded as the span's failure.
        """
        parent = trace.set_span_in_context(self._span, Context())
        span = self._tracer.start_span(name, context=parent, start_time=int(started_at * 1e9))
        with Span(self._tracer, span).ended() as within:
            yield within

    @contextmanager
    def ended(self) -> Iterator[Span]:
        """This span, ended with the block and failed by an exception that leaves it."""
        try:
            yield self
        except BaseException as error:
            self._fail(error)
            raise
        finally:
            self._span.end()

    def _fail(self, error: BaseException) -> None:
        """Record ``error``; only a defect or a limit of the server makes the span one of status ERROR."""
        typed = Cancelled("aborted") if isinstance(error, GeneratorExit) else from_exception(error)
        self._span.set_attribute("error.type", typed.kind)
        self.set_attributes({"status": typed.http_status, "error": typed.message})
        if typed.http_status >= 500:
            self._span.set_status(StatusCode.ERROR, typed.message)


class Tracing:
    """The requests' spans of this process; without arguments none is recorded."""

    def __init__(
        self, provider: trace.TracerProvider | None = None, shutdown: Callable[[], None] = lambda: None
    ) -> None:
        self._tracer = (provider or trace.NoOpTracerProvider()).get_tracer("bagel_triton", bagel_triton.__version__)
        self._shutdown = shutdown

    @contextmanager
    def request(self, carrier: Mapping[str, Any]) -> Iterator[Span]:
        """A request's span, under the one that ``carrier``'s trace headers name; a malformed parent is none.

        An exception that leaves the block is recorded as the request's failure.
        """
        given = {name.lower(): str(value) for name, value in carrier.items() if name.lower() in HEADERS}
        # Into an empty context: the parent is the one given and no other.
        parent = TraceContextTextMapPropagator().extract(given, context=Context())
        span = self._tracer.start_span("bagel", context=parent, kind=SpanKind.SERVER)
        with Span(self._tracer, span).ended() as within:
            if (request_id := given.get(REQUEST_ID)) is not None:
                within.set_attributes({"http_request_id": request_id})
            yield within
            within.set_attributes({"status": 200})

    def close(self) -> None:
        """Send the spans that have ended; takes no longer than a shutdown can wait."""
        self._shutdown()


def endpoint(environ: Mapping[str, str] = os.environ) -> str | None:
    """The collector that the environment names; None where traces are off."""
    off = environ.get("OTEL_SDK_DISABLED", "").lower() == "true" or environ.get("OTEL_TRACES_EXPORTER") == "none"
    return None if off else next((environ[name] for name in ENDPOINTS if environ.get(name)), None)


def destination() -> str | None:
    """The destination of traces, for the summary of ``serve``; None if they are off."""
    url = endpoint()
    return url if url is None or _exporting() is not None else f"nowhere: {MISSING}"


def from_environment() -> Tracing:
    """Tracing as the environment configures it."""
    if endpoint() is None:
        return Tracing()
    if (exporting := _exporting()) is None:  # the variable may be set for other programs: no reason not to serve
        log.warning("traces are off: %s", MISSING)
        return Tracing()
    return exporting()


def _exporting() -> Callable[[], Tracing] | None:
    try:
        from bagel_triton.telemetry.otlp import exporting
    except ImportError:
        return None
    return exporting


def headers_of(carrier: Mapping[str, Any]) -> dict[str, str]:
    """The trace headers among a request's parameters, in lower case, as gRPC metadata has to be."""
    given = {name.lower(): str(value) for name, value in carrier.items()}
    return passed_on([given[PARENT]] if PARENT in given else [], [given[STATE]] if STATE in given else [])


def passed_on(parents: Sequence[str], states: Sequence[str]) -> dict[str, str]:
    """The trace headers to send on, of those received; none if they do not conform to the standard.

    A header of another form may hold characters that gRPC metadata cannot.
    """
    if len(parents) != 1 or not _PARENT.fullmatch(parents[0]):
        return {}
    state = ",".join(states)
    return {PARENT: parents[0]} | ({STATE: state} if len(state) <= MAX_STATE and _STATE.fullmatch(state) else {})


def request_attributes(plan: Plan) -> Attributes:
    """Attributes of a request: kind, sizes and counts, never its prompt."""
    decoding = plan.decoding
    text = {} if decoding is None else {"max_new_tokens": decoding.max_new_tokens, "texts": len(decoding.seeds)}
    return {
        "unique_request_id": plan.request_id,  # clients may repeat request_id; this one is unique
        "modality": "text" if plan.flow is None else "image",
        "prompt_tokens": plan.usage.prompt_tokens,
        "priority": plan.scheduling.priority,
        **text,
        **image_attributes(plan.flow),
    }


def size_attributes(flow: FlowSettings | None) -> Attributes:
    """The size of the images that are asked for, if any are."""
    return {} if flow is None else {"height": flow.height, "width": flow.width}


def image_attributes(flow: FlowSettings | None) -> Attributes:
    """The images that are asked for, if any are."""
    if flow is None:
        return {}
    return {
        **size_attributes(flow),
        "num_inference_steps": flow.num_inference_steps,
        "images": flow.num_images,
        "cache": flow.cache,
    }


def text_attributes(answers: Sequence[Answer]) -> Attributes:
    """The texts that were decoded."""
    return {
        "text_tokens": sum(answer.tokens for answer in answers),
        "reasoning_tokens": sum(answer.reasoning_tokens for answer in answers),
    }
