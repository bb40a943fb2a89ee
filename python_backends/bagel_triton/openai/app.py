"""The HTTP API: routes, and what a request goes through."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import aclosing, asynccontextmanager
from functools import partial
from typing import Any, TypeVar

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from bagel_triton.openai import schema, stream
from bagel_triton.openai.chat import to_task
from bagel_triton.openai.errors import BodyTooLarge, error_response, http_exception, to_bagel_error
from bagel_triton.openai.image_fetch import RemoteImages
from bagel_triton.openai.image_source import ImageLoader
from bagel_triton.openai.reply import collect, new_header
from bagel_triton.openai.settings import ProxySettings
from bagel_triton.protocol.errors import Cancelled, ModelNotFound, StageUnavailable
from bagel_triton.telemetry import tracing
from bagel_triton.triton.async_client import Client, TritonClient

T = TypeVar("T")


def create_app(settings: ProxySettings, client: Client | None = None, remote: RemoteImages | None = None) -> Starlette:
    """The proxy as an ASGI application; it closes ``client`` when it ends."""
    source = ImageLoader((remote or RemoteImages()) if settings.fetch_remote else None)
    api = _Api(settings, client or TritonClient(settings), source)
    return Starlette(
        routes=[
            Route("/v1/chat/completions", api.chat_completions, methods=["POST"]),
            Route("/v1/models", api.models, methods=["GET"]),
            Route("/health", api.health, methods=["GET"]),
        ],
        exception_handlers={HTTPException: partial(http_exception, metrics_url=settings.metrics_url)},
        lifespan=api.lifespan,
    )


class _Api:
    def __init__(self, settings: ProxySettings, client: Client, source: ImageLoader) -> None:
        self._settings = settings
        self._client = client
        self._source = source
        self._created = int(time.time())

    @asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        yield
        await self._client.close()

    async def chat_completions(self, request: Request) -> Response:
        try:
            return await self._complete(request)
        except Exception as error:
            return error_response(to_bagel_error(error), self._settings.retry_after_s)

    async def _complete(self, request: Request) -> Response:
        body = schema.parse(await self._read(request))
        header = new_header(self._served_model(body.model))
        task = to_task(body)
        came = request.headers
        trace = tracing.passed_on(came.getlist(tracing.PARENT), came.getlist(tracing.STATE))
        responses = task.run(self._client, self._source, header.id, trace)
        if body.stream:
            include_usage = bool(body.stream_options and body.stream_options.include_usage)
            chunks = stream.chunks(responses, header, task.modality, include_usage)
            return stream.EventStream(await _unless_gone(request, anext(chunks)), chunks)
        async with aclosing(responses):
            completion = await _unless_gone(request, collect(responses, header, task.modality))
        return Response(msgspec.json.encode(completion), media_type="application/json")

    async def models(self, request: Request) -> Response:
        models = [
            {"id": name, "object": "model", "created": self._created, "owned_by": "bagel-triton"}
            for name in self._settings.served_model_names
        ]
        return JSONResponse({"object": "list", "data": models})

    async def health(self, request: Request) -> Response:
        try:
            models = await self._client.readiness()
        except StageUnavailable as error:
            models = dict.fromkeys(self._settings.models or ("bagel",), False)
            return JSONResponse({"status": "not ready", "models": models, "message": error.message}, 503)
        waiting = [name for name, ready in models.items() if not ready]
        if waiting:
            message = f"not ready: {', '.join(waiting)}"
            return JSONResponse({"status": "not ready", "models": models, "message": message}, 503)
        return JSONResponse({"status": "ready", "models": models})

    def _served_model(self, model: str | None) -> str:
        names = self._settings.served_model_names
        if model is None:
            return names[0]
        if model not in names:
            raise ModelNotFound.value("model", model, ", ".join(names))
        return model

    async def _read(self, request: Request) -> bytes:
        limit = self._settings.max_body_bytes
        body = bytearray()
        try:
            async for part in request.stream():
                body += part
                if len(body) > limit:
                    raise BodyTooLarge(f"the body is too large; allowed: at most {limit} bytes")
        except ClientDisconnect as error:
            raise Cancelled("the client left while it sent the request") from error
        return bytes(body)


async def _unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """What ``work`` returns; it is cancelled if the client leaves before it does.

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
