"""Common work of the endpoints: read a request within limits, run it, and answer errors in one shape."""

from __future__ import annotations

import asyncio
import binascii
import contextlib
import functools
import io
import re
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from bagel_triton.openai import request_log
from bagel_triton.openai.errors import BodyTooLarge, RequestTimeout, UnsupportedEncoding, error_response, to_bagel_error
from bagel_triton.openai.image_io import ImageLoader
from bagel_triton.openai.schema import GivenFields, NotJson
from bagel_triton.openai.settings import ProxySettings
from bagel_triton.protocol.adapters import AdapterCall
from bagel_triton.protocol.errors import (
    BagelError,
    Cancelled,
    InvalidRequest,
    ModelNotFound,
    Overloaded,
    format_value,
)
from bagel_triton.telemetry import tracing
from bagel_triton.triton.client import Client, StageResponse, let_others_run

T = TypeVar("T")
Handler = Callable[[Request], Awaitable[Response]]
LARGE_BODY = 256 * 1024  # bytes; a smaller body is parsed faster than a thread is started


class ReceiveBuffer:
    """The memory that all bodies may take together while they arrive and are parsed, in bytes.

    What has arrived counts, not what a header announces: a slow client holds no more than it has sent.
    """

    def __init__(self, limit: int) -> None:
        self._limit, self.held = limit, 0

    @contextmanager
    def reserving(self) -> Iterator[Callable[[int], None]]:
        """A function that reserves so many bytes more, until the end of the context.

        Raises:
            Overloaded: by that function, if they would be too many.
        """
        mine = 0

        def reserve(size: int) -> None:
            nonlocal mine
            if self.held + size > self._limit:
                raise Overloaded(f"the bodies being received have {self.held} bytes; allowed: {self._limit} in all")
            self.held += size
            mine += size

        try:
            yield reserve
        finally:
            self.held -= mine


class Runnable(Protocol):
    """A request in the model's terms."""

    def run(
        self, client: Client, source: ImageLoader, request_id: str, headers: dict[str, str]
    ) -> AsyncGenerator[StageResponse, None]:
        """The responses to it; closing the generator aborts the request."""


@dataclass
class Api:
    """State shared by the endpoints: the connection to Triton, the image loader and the settings.

    ``max_model_len`` is the tokens that a request may have, once Triton has said so.
    """

    settings: ProxySettings
    client: Client
    source: ImageLoader
    receiving: ReceiveBuffer
    created: int = field(default_factory=lambda: int(time.time()))
    max_model_len: int | None = field(init=False, default=None)
    _adapters: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self._adapters = list(self.settings.lora_modules)

    def endpoint(self, handler: Handler) -> Handler:
        """``handler`` with every exception answered as an error in OpenAI's shape."""

        @functools.wraps(handler)
        async def answer(request: Request) -> Response:
            try:
                return await handler(request)
            except Exception as error:
                return error_response(to_bagel_error(error), self.settings.retry_after_s)

        return answer

    async def parse(self, request: Request, parse: Callable[[bytes], T], kinds: str = "application/json") -> T:
        """The whole body, parsed by ``parse``; a large one is parsed in a thread. An error names the ``kinds`` allowed.

        Raises:
            InvalidRequest: the body is too large, or is not what ``parse`` takes.
            Overloaded: all bodies together are too large.
            Cancelled: the client left while it sent the body.
        """
        try:
            return await self._parse(request, parse)
        except NotJson as error:
            kind = request.headers.get("content-type", "")
            if not kind or "json" in kind.lower():
                raise
            raise NotJson(f"{error.message}; its content-type is {format_value(kind)}; allowed: {kinds}") from error

    async def _parse(self, request: Request, parse: Callable[[bytes], T]) -> T:
        async with self.body(request) as parts:
            body = bytearray()
            async for part in parts:
                body += part
            if len(body) <= LARGE_BODY:
                return parse(bytes(body))
            data, request.state.attachments = await asyncio.to_thread(detach, body)
            del body
            await asyncio.to_thread(check_structure, data)
            return await asyncio.to_thread(parse, data)

    @asynccontextmanager
    async def body(self, request: Request) -> AsyncGenerator[AsyncGenerator[bytes, None], None]:
        """The pieces of the body as they come; its memory counts as used until the end of the context."""
        with self.receiving.reserving() as reserve:
            yield self._parts(request, reserve)

    async def _parts(self, request: Request, reserve: Callable[[int], None]) -> AsyncGenerator[bytes, None]:
        """The pieces of the body as they come.

        Raises:
            BodyTooLarge: it has more bytes than the settings allow.
            UnsupportedEncoding: it is compressed.
            Overloaded: all bodies together have.
            RequestTimeout: it took longer than the settings allow.
            Cancelled: the client left.
        """
        limit, timeout_s = self.settings.max_body_bytes, self.settings.http.body_timeout_s
        too_large = BodyTooLarge(f"the body is too large; allowed: at most {limit} bytes")
        encoding = request.headers.get("content-encoding", "identity")
        if encoding.lower() not in ("identity", ""):
            raise UnsupportedEncoding.value("content-encoding", encoding, "a body that is not compressed")
        length = request.headers.get("content-length", "")
        if length.isdecimal() and int(length[:20]) > limit:
            raise too_large
        stream, received = request.stream(), 0
        deadline = asyncio.get_running_loop().time() + timeout_s
        while True:
            try:
                async with asyncio.timeout_at(deadline):
                    part = await anext(stream)
            except StopAsyncIteration:
                return
            except TimeoutError as error:
                raise RequestTimeout(f"the body did not arrive within {timeout_s} s") from error
            except ClientDisconnect as error:
                raise Cancelled("the client left while it sent the request") from error
            received += len(part)
            if received > limit:
                raise too_large
            reserve(len(part))
            yield part

    @property
    def adapters(self) -> Sequence[str]:
        """The names of the server's adapters, as it last said."""
        return self._adapters

    async def change_adapters(self, call: AdapterCall) -> None:
        """Carry ``call`` out, and learn the names of the adapters and the model's length.

        Raises:
            BagelError: it could not be carried out.
        """
        found = await self.client.adapters(call)
        self._adapters, self.max_model_len = list(found.names), found.max_model_len

    async def refresh_adapters(self) -> None:
        """Learn them anew, as another proxy may have changed them; they stay where Triton is gone."""
        with contextlib.suppress(BagelError, TimeoutError):
            async with asyncio.timeout(self.settings.ready_timeout_s):
                await self.change_adapters(AdapterCall("list"))

    @property
    def model_names(self) -> list[str]:
        """What a request may give as model."""
        names = self.settings.served_model_names
        return [*names, *self.adapters, *(f"{name}:{adapter}" for name in names for adapter in self.adapters)]

    async def served_model(self, model: str | None, given: GivenFields | None = None) -> str:
        """The name that the reply carries for a request for ``model``.

        Of one that names an adapter, NAME or MODEL:NAME, the adapter is added to the fields that are ``given``.

        Raises:
            ModelNotFound: it is none of those served.
            InvalidRequest: another adapter is given.
        """
        names = self.settings.served_model_names
        if model is None:
            return names[0]
        if model in names:
            return model
        if model not in self.model_names:
            await self.refresh_adapters()
        called = {f"{served}:{name}": name for served in names for name in self.adapters}
        adapter = model if model in self.adapters else called.get(model)
        if adapter is None:
            raise ModelNotFound.value("model", model, ", ".join([*names, *self.adapters]))
        if given is not None and given.fields.get("lora") != adapter:
            given.add("lora", adapter, "model")
        return model

    def run(self, task: Runnable, request: Request, reply_id: str) -> AsyncGenerator[StageResponse, None]:
        """The responses to ``task``, under the trace and the request id that ``request`` carries."""
        came = request.headers
        headers = tracing.passed_on(came.getlist(tracing.PARENT), came.getlist(tracing.STATE))
        if (current := request_log.CURRENT.get()) is not None:
            headers[request_log.HEADER] = current
        source = self.source.holding(getattr(request.state, "attachments", {}))
        return task.run(self.client, source, reply_id, headers)


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of ``work``, which is cancelled if the client leaves first.

    Raises:
        Cancelled: the client left.
    """
    worker = asyncio.ensure_future(work)
    gone = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait({worker, gone}, return_when=asyncio.FIRST_COMPLETED)
        if worker.done():
            return worker.result()
        raise Cancelled("the client left before the reply was ready")
    finally:
        worker.cancel()
        gone.cancel()
        await asyncio.gather(worker, gone, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


# A JSON parser and a base64 decoder hold the interpreter's lock for as long as a string is long:
# an image of 45 MiB stops every other request for most of a second, from any thread.
# So large images are taken out of the body by a search, and decoded in pieces between which
# other threads run; the parser then sees a few kilobytes.
MIN_LENGTH = 128 * 1024  # characters of base64; shorter ones are left to the parser
_MARKER = b";base64,"
_PIECE = 128 * 1024  # characters decoded at a time, a multiple of 4: half a millisecond
_SEARCHED_AT_ONCE = 2**20
_ALPHABETS = {"standard": (b"+", b"/"), "URL-safe": (b"-", b"_")}
_FROM_URL_SAFE = bytes.maketrans(b"-_", b"+/")
# A list of two bytes, "[]", takes the parser half a microsecond and a hundred bytes of memory.
MAX_STRUCTURE = 512 * 1024  # bytes of JSON outside its texts: five times those of the longest conversation
_JSON_TEXT = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)


def detach(body: bytearray) -> tuple[bytes, Mapping[str, bytes]]:
    """Empty ``body``: its text with a name in the place of each large base64 text of a data URL, and the bytes by name.

    A text that is not base64 alone (in lines, with percent signs or errors) stays where it is.
    """
    nonce = secrets.token_hex(16)  # a client must not be able to name another text
    kept: list[bytes] = []
    detached: dict[str, bytes] = {}
    copied = searched = 0
    while (at := body.find(_MARKER, searched)) >= 0:
        start = at + len(_MARKER)
        end = _find_quote(body, start)
        if end < 0:
            break
        searched = end
        if end - start < MIN_LENGTH or (data := _decode(body, start, end)) is None:
            continue
        name = f"{nonce}-{len(detached)}"
        detached[name] = data
        kept += [bytes(body[copied:start]), name.encode()]
        copied = end
    kept.append(bytes(body[copied:]))
    body.clear()  # here, and not in the thread that serves others: to free it takes a while
    return b"".join(kept), detached


def _find_quote(body: bytearray, start: int) -> int:
    for at in range(start, len(body), _SEARCHED_AT_ONCE):
        if (found := body.find(b'"', at, at + _SEARCHED_AT_ONCE)) >= 0:
            return found
        let_others_run()
    return -1


def _decode(body: bytearray, start: int, end: int) -> bytes | None:
    """The bytes of base64 in either alphabet, with or without padding, its slashes escaped or not; else None."""
    decoded, rest, alphabets = io.BytesIO(), b"", set()
    with memoryview(body) as view:
        for at in range(start, end, _PIECE):
            is_last = at + _PIECE >= end
            piece = rest + bytes(view[at : min(at + _PIECE, end)])
            escape = b"\\" if piece.endswith(b"\\") else b""  # its slash is in the next piece
            piece = piece.removesuffix(escape).replace(b"\\/", b"/")
            alphabets |= {name for name, marks in _ALPHABETS.items() if any(mark in piece for mark in marks)}
            digits = piece.rstrip(b"=") if is_last else piece
            whole = len(digits) if is_last else len(digits) // 4 * 4
            rest = digits[whole:] + escape
            if len(alphabets) > 1 or len(piece) - len(digits) > 2 or (not is_last and b"=" in piece):
                return None
            try:
                standard = digits[:whole].translate(_FROM_URL_SAFE) + b"=" * (-whole % 4)
                decoded.write(binascii.a2b_base64(standard, strict_mode=True))
            except binascii.Error:
                return None
            let_others_run()
    return None if rest else decoded.getvalue()


def check_structure(data: bytes) -> None:
    """Refuse JSON of more small values than a request can have, before each becomes an object.

    Raises:
        InvalidRequest: too much of it is outside its texts.
    """
    texts = sum(found.end() - found.start() for found in _JSON_TEXT.finditer(data))
    if len(data) - texts > MAX_STRUCTURE:
        raise InvalidRequest(
            f"the body has {len(data) - texts} bytes outside its texts; allowed: at most {MAX_STRUCTURE}"
        )
