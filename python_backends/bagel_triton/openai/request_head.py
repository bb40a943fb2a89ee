"""Rules for a request's head that the web server leaves to the application."""

from __future__ import annotations

import re
from collections.abc import Sequence
from urllib.parse import unquote

import msgspec
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from bagel_triton.openai.errors import HeaderTooLarge, error_body
from bagel_triton.protocol.errors import InvalidRequest

MAX_HEADER = 64 * 1024  # bytes of the request's line and its header
_ABSOLUTE = re.compile(rb"https?://([^/]*)(.*)", re.IGNORECASE | re.DOTALL)


class RequestHead:
    """Middleware that reads a request's target as RFC 9112 has it, and refuses heads that are unsafe.

    A whole URL is a target like its path, and its host takes the place of ``Host`` (section 3.2.2). A head is
    limited, and so is a body to one length: a gateway that goes by the other one would take the rest of the body for a
    request of another client (section 6.1). Both refusals close the connection.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        _make_relative(scope)
        if (error := _problem(scope)) is None:
            await self._app(scope, receive, send)
            return
        body = msgspec.json.encode(error_body(error))
        refusal = Response(body, error.http_status, {"Connection": "close"}, media_type="application/json")
        await refusal(scope, receive, send)


def _problem(scope: Scope) -> InvalidRequest | None:
    headers: Sequence[tuple[bytes, bytes]] = scope["headers"]
    size = len(scope["raw_path"] or b"") + len(scope["query_string"])
    size += sum(len(name) + len(value) + len(b": \r\n") for name, value in headers)
    if size > MAX_HEADER:
        return HeaderTooLarge(f"the header has {size} bytes; allowed: at most {MAX_HEADER}")
    names = [name for name, _ in headers]
    if b"transfer-encoding" in names and b"content-length" in names:
        return InvalidRequest("Transfer-Encoding and Content-Length are both given; allowed: one of them")
    return None


def _make_relative(scope: Scope) -> None:
    """Split a target that is a whole URL into its path and its host, in place."""
    found = _ABSOLUTE.fullmatch(scope.get("raw_path") or b"")
    if found is None:
        return
    scope["raw_path"] = found[2] or b"/"
    scope["path"] = unquote(scope["raw_path"].decode("ascii"))
    others = [(name, value) for name, value in scope["headers"] if name != b"host"]
    scope["headers"] = [(b"host", found[1]), *others]
