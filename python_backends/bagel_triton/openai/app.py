"""The HTTP API as an ASGI application: its endpoints, and what surrounds them all."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial

import msgspec
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from bagel_triton.openai import chat, images, openapi, page, request_log, responses, status
from bagel_triton.openai.endpoint import Api, ReceiveBuffer
from bagel_triton.openai.errors import ErrorBody, error_detail, http_exception
from bagel_triton.openai.image_fetch import RemoteImages
from bagel_triton.openai.image_io import ImageLoader
from bagel_triton.openai.request_log import HttpMetrics, RequestLog
from bagel_triton.openai.settings import MIB, AllowedSources, HttpOptions, ProxySettings
from bagel_triton.triton.client import Client, TritonClient

# Open without a key: the page and the API's description hold no secret (the page prompts for
# the key), and the name of a generated file cannot be guessed.
_OPEN_PATHS = ("/", "/docs", "/openapi.json", "/version", *status.OPEN_PATHS)
_OPEN_PREFIXES = ("/page/", images.FILES)


def is_open(path: str) -> bool:
    """Whether ``path`` is served without a key."""
    return path in _OPEN_PATHS or path.startswith(_OPEN_PREFIXES)


def create_app(settings: ProxySettings, client: Client | None = None, remote: RemoteImages | None = None) -> Starlette:
    """The API; it closes ``client`` when it ends."""
    remote = remote or RemoteImages(allowed=AllowedSources(settings.http.allowed_image_hosts))
    source = ImageLoader(remote if settings.fetch_remote else None)
    receiving = ReceiveBuffer(settings.http.max_receiving_mib * MIB)
    api, metrics = Api(settings, client or TritonClient(settings), source, receiving), HttpMetrics()
    routes: list[BaseRoute] = [
        *chat.routes(api),
        *images.routes(api),
        *responses.routes(api),
        *status.routes(api, metrics),
        *openapi.routes(api, is_open),
        *page.routes(),
    ]
    known = [route.path for route in routes if isinstance(route, Route)]

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await api.client.close()

    app = Starlette(
        routes=routes,
        middleware=_middleware(settings.http, metrics),
        exception_handlers={HTTPException: partial(http_exception, known=known)},
        lifespan=lifespan,
    )
    # A slash too many would be redirected, which a client that posts an image pays for twice.
    app.router.redirect_slashes = False
    app.state.http = settings.http
    return app


def _middleware(options: HttpOptions, metrics: HttpMetrics) -> list[Middleware]:
    """The outermost first. CORS comes before the keys: a browser's preflight carries none."""
    around = [Middleware(RequestLog, metrics, options.access_log)]
    if options.cors_origins:
        exposed = [request_log.HEADER, "Retry-After"]
        around.append(
            Middleware(
                CORSMiddleware,
                allow_origins=options.cors_origins,
                allow_methods=["GET", "POST"],
                allow_headers=["*"],
                expose_headers=exposed,
            )
        )
    if options.api_keys:
        around.append(Middleware(ApiKeys, options.api_keys, is_open))
    return around


class ApiKeys:
    """Middleware that refuses requests without one of the keys, except for paths that are open.

    Only digests are kept, under a secret of this process, and every one is compared in full:
    the time of an answer says nothing about a key, its length or its place in the list.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str], is_open: Callable[[str], bool]) -> None:
        self._app, self._is_open = app, is_open
        self._secret = secrets.token_bytes(32)
        self._digests = [self._digest(key) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._is_open(scope["path"]):
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("authorization", "")
        scheme, _, key = given.partition(" ")
        if scheme.lower() == "bearer" and self._knows(key.strip()):
            await self._app(scope, receive, send)
            return
        problem = "the API key is not valid" if given else "an API key is required"
        detail = error_detail(
            f"{problem}; allowed: the header 'Authorization: Bearer KEY' with a key of this server",
            "invalid_request_error",
            None,
            "invalid_api_key",
        )
        body = msgspec.json.encode(ErrorBody(detail))
        headers = {"WWW-Authenticate": "Bearer"}
        await Response(body, 401, headers, media_type="application/json")(scope, receive, send)

    def _digest(self, key: str) -> bytes:
        return hmac.digest(self._secret, key.encode(), hashlib.sha256)

    def _knows(self, key: str) -> bool:
        digest = self._digest(key)
        found = False
        for known in self._digests:
            found |= hmac.compare_digest(digest, known)
        return found
