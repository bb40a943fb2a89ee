"""Each request's id, its line in the log, and the API's own measurements."""

from __future__ import annotations

import logging
import re
import time
import uuid
from contextvars import ContextVar
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bagel_triton.telemetry import tracing
from bagel_triton.telemetry.metrics import SECONDS

HEADER = tracing.REQUEST_ID
CURRENT: ContextVar[str | None] = ContextVar("request_id", default=None)
_ALLOWED = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")


def take(given: str | None) -> str:
    """``given`` if it is fit for a header and a log line, else a new id.

    A client's id identifies nothing here but its own lines in the log: two requests may share one.
    """
    return given if given is not None and _ALLOWED.fullmatch(given) else f"req_{uuid.uuid4().hex}"


class RequestIdFilter(logging.Filter):
    """Puts the current request's id at the end of each line of the log."""

    def filter(self, record: logging.LogRecord) -> bool:
        if (current := CURRENT.get()) is not None and not getattr(record, "has_request_id", False):
            record.msg = f"{record.getMessage()} [{current}]"
            record.args = None
            record.has_request_id = True
        return True


CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"  # Triton's own
NOT_LOGGED = ("/health", "/health/live", "/health/ready", "/ping", "/metrics")  # polled by machines
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
CLIENT_LEFT = 499
log = logging.getLogger(__name__)


class HttpMetrics:
    """Counts, durations and open requests by endpoint."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "bagel_http_requests",
            "HTTP requests that ended, by endpoint and status; 499 where the client left",
            ["method", "endpoint", "status"],
            registry=self._registry,
        )
        self.seconds = Histogram(
            "bagel_http_request_seconds",
            "From a request's header to the end of its reply",
            ["endpoint"],
            buckets=SECONDS,
            registry=self._registry,
        )
        self.active = Gauge("bagel_http_requests_active", "HTTP requests at work now", registry=self._registry)

    def page(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)


class RequestLog:
    """Outermost middleware: the request's id, its line in the log, and its measurements."""

    def __init__(self, app: ASGIApp, metrics: HttpMetrics, access_log: bool) -> None:
        self._app, self._metrics, self._access_log = app, metrics, access_log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        identity = take(Headers(scope=scope).get(HEADER))
        token = CURRENT.set(identity)
        started, status, ended, left = time.perf_counter(), 500, False, False

        async def tracked_receive() -> Message:
            nonlocal left
            message = await receive()
            left = left or message["type"] == "http.disconnect"
            return message

        async def tracked_send(message: Message) -> None:
            nonlocal status, ended
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[HEADER] = identity
            await send(message)
            ended = ended or (message["type"] == "http.response.body" and not message.get("more_body"))

        self._metrics.active.inc()
        try:
            await self._app(scope, tracked_receive, tracked_send)
        finally:
            self._metrics.active.dec()
            self._ended(scope, CLIENT_LEFT if left and not ended else status, time.perf_counter() - started)
            CURRENT.reset(token)

    def _ended(self, scope: Scope, status: int, seconds: float) -> None:
        endpoint = _endpoint(scope)
        known = endpoint != "other" and scope["method"] in METHODS
        method = scope["method"] if known else "other"  # a client must not make up label values
        self._metrics.requests.labels(method, endpoint, str(status)).inc()
        self._metrics.seconds.labels(endpoint).observe(seconds)
        if self._access_log and endpoint not in NOT_LOGGED:
            path = "".join(c if c.isprintable() else "?" for c in scope["path"][:200])
            log.info("%d %s %s %.3f s", status, scope["method"], path, seconds)


def _endpoint(scope: Scope) -> str:
    """The route's path, with its parameters' names; ``other`` where no route matched."""
    route: Any = scope.get("route")
    return getattr(route, "path", None) or "other"
