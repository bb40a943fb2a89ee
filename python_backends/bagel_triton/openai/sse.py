"""Server-sent events with names, as OpenAI's images and responses endpoints stream them."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

import msgspec
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from bagel_triton.openai.errors import ErrorDetail, error_body, to_bagel_error
from bagel_triton.protocol.events import ProgressEvent

HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # nginx would hold events back


class ErrorEvent(msgspec.Struct, frozen=True):
    """The last event of a stream that failed."""

    error: ErrorDetail
    type: str = "error"


def event(name: str, data: msgspec.Struct | dict[str, Any]) -> bytes:
    """``data`` as an event called ``name``."""
    return b"event: " + name.encode() + b"\ndata: " + msgspec.json.encode(data) + b"\n\n"


def progress(done: ProgressEvent) -> bytes:
    """Progress as a comment: it keeps the connection alive, and no client takes it for an event."""
    return f": {done.stage} {done.step}/{done.steps}\n\n".encode()


class NamedEvents(StreamingResponse):
    """A reply whose ``first`` piece is known to exist, so that 200 is its true status."""

    def __init__(self, first: bytes, rest: AsyncGenerator[bytes, None]) -> None:
        super().__init__(_pieces(first, rest), headers=HEADERS, media_type="text/event-stream")
        self._rest = rest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._rest):
            await super().__call__(scope, receive, send)


async def _pieces(first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    try:
        async for piece in rest:
            yield piece
    except Exception as error:
        # The status line is out: the error can only be an event.
        yield event("error", ErrorEvent(error_body(to_bagel_error(error)).error))
