"""Server-sent events: with names, as the images and responses endpoints stream them, and without, as chat does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

import msgspec
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from bagel_triton.openai.errors import ErrorBody, ErrorDetail, error_body, to_bagel_error
from bagel_triton.protocol.events import ProgressEvent

KEEP_ALIVE = b": keep-alive\n\n"
KEEP_ALIVE_S = 10.0  # proxies close a connection that is silent for a minute, some much sooner
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


def failed(body: ErrorBody) -> bytes:
    """The last event of a stream that failed."""
    return event("error", ErrorEvent(body.error))


class EventStream(StreamingResponse):
    """A reply of server-sent events, of which ``first`` is known to exist, so 200 is its true status.

    An error after it becomes the event that ``failed`` makes of it; ``end`` follows where there
    was none. A comment goes out whenever nothing came for ``KEEP_ALIVE_S``.
    """

    def __init__(
        self,
        first: bytes,
        rest: AsyncGenerator[bytes, None],
        failed: Callable[[ErrorBody], bytes] = failed,
        end: bytes = b"",
    ) -> None:
        super().__init__(_events(first, rest, failed, end), headers=HEADERS, media_type="text/event-stream")
        self._rest = rest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._rest):
            await super().__call__(scope, receive, send)


async def _events(
    first: bytes, rest: AsyncGenerator[bytes, None], failed: Callable[[ErrorBody], bytes], end: bytes
) -> AsyncIterator[bytes]:
    yield first
    try:
        async with aclosing(_kept_alive(rest)) as events:
            async for piece in events:
                yield piece
    except Exception as error:
        # The status line is out: the error can only be an event.
        yield failed(error_body(to_bagel_error(error)))
    else:
        if end:
            yield end


async def _kept_alive(events: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    """``events``, with a comment line whenever none came for ``KEEP_ALIVE_S``."""
    while True:
        coming = asyncio.ensure_future(anext(events))
        try:
            while not (await asyncio.wait({coming}, timeout=KEEP_ALIVE_S))[0]:
                yield KEEP_ALIVE
            piece = coming.result()
        except StopAsyncIteration:
            return
        finally:
            if not coming.done():
                coming.cancel()
                await asyncio.wait({coming})
        yield piece
