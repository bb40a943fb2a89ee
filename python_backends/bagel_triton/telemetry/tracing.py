"""Whether requests are traced, and under whose trace; knows no tracing library until they are.

The switches are the standard ones: an ``OTEL_EXPORTER_OTLP_*ENDPOINT`` turns traces on, and
``OTEL_SDK_DISABLED=true`` or ``OTEL_TRACES_EXPORTER=none`` off again.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

from bagel_triton.telemetry.spans import NoSpan, Span

# https://www.w3.org/TR/trace-context/
PARENT, STATE = "traceparent", "tracestate"
REQUEST_ID = "x-request-id"  # of the HTTP API's log
HEADERS = (PARENT, STATE, REQUEST_ID)
ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
MAX_STATE = 512  # characters that the standard wants passed on
_PARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}(-[!-~]{0,256})?")
_STATE = re.compile(r"[ -~]+")
MISSING = "the extra bagel-triton[tracing] is not installed"
log = logging.getLogger(__name__)


class Tracing(Protocol):
    """Where the spans of this process go."""

    def request(self, carrier: Mapping[str, Any]) -> AbstractContextManager[Span]:
        """A request's span, under the one that ``carrier``'s trace headers name if they name one.

        An exception that leaves the block is what the request failed of.
        """

    def close(self) -> None:
        """Send what has ended; takes no longer than a shutdown can wait."""


class NoTracing:
    """Nobody looks."""

    @contextmanager
    def request(self, carrier: Mapping[str, Any]) -> Iterator[NoSpan]:
        """Do nothing around the block."""
        yield NoSpan()

    def close(self) -> None:
        """Nothing has to be sent."""


def endpoint(environ: Mapping[str, str] = os.environ) -> str | None:
    """The collector that the environment names; None where traces are off."""
    off = environ.get("OTEL_SDK_DISABLED", "").lower() == "true" or environ.get("OTEL_TRACES_EXPORTER") == "none"
    return None if off else next((environ[name] for name in ENDPOINTS if environ.get(name)), None)


def destination() -> str | None:
    """Where traces go, for a person to read; None where none are asked for."""
    url = endpoint()
    return url if url is None or _library() is not None else f"nowhere: {MISSING}"


def from_environment() -> Tracing:
    """What the environment asks for."""
    if endpoint() is None:
        return NoTracing()
    if (library := _library()) is None:  # the variable may be there for others' sake: no reason not to serve
        log.warning("traces are off: %s", MISSING)
        return NoTracing()
    return library()


def _library() -> Callable[[], Tracing] | None:
    try:
        from bagel_triton.telemetry.opentelemetry import OpenTelemetryTracing
    except ImportError:
        return None
    return OpenTelemetryTracing


def headers_of(carrier: Mapping[str, Any]) -> dict[str, str]:
    """The trace headers among a request's parameters, in lower case, as gRPC metadata has to be."""
    given = {name.lower(): str(value) for name, value in carrier.items()}
    return passed_on([given[PARENT]] if PARENT in given else [], [given[STATE]] if STATE in given else [])


def passed_on(parents: Sequence[str], states: Sequence[str]) -> dict[str, str]:
    """The headers to go on with, of those that came; none if they are not what the standard says.

    A header of any other form may hold what no gRPC metadata can.
    """
    if len(parents) != 1 or not _PARENT.fullmatch(parents[0]):
        return {}
    state = ",".join(states)
    return {PARENT: parents[0]} | ({STATE: state} if len(state) <= MAX_STATE and _STATE.fullmatch(state) else {})
