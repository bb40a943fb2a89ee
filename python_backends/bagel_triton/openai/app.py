"""The HTTP API as an ASGI application: its endpoints, and what surrounds them all."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import BaseRoute, Route

from bagel_triton.openai import completions, health, images, models, openapi, page, request_id, responses
from bagel_triton.openai.address_rules import AllowedSources
from bagel_triton.openai.auth import ApiKeys
from bagel_triton.openai.endpoint import Api, ReceiveBuffer
from bagel_triton.openai.errors import http_exception
from bagel_triton.openai.http_metrics import HttpMetrics, RequestLog
from bagel_triton.openai.image_fetch import RemoteImages
from bagel_triton.openai.image_source import ImageLoader
from bagel_triton.openai.settings import MIB, HttpOptions, ProxySettings
from bagel_triton.triton.async_client import Client, TritonClient

# Open without a key: the page and the API's description hold no secret (the page prompts for
# the key), and the name of a generated file cannot be guessed.
_OPEN_PATHS = ("/", "/docs", "/openapi.json", "/version", *health.OPEN_PATHS)
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
        *completions.routes(api),
        *images.routes(api),
        *responses.routes(api),
        *models.routes(api),
        *health.routes(api, metrics),
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
        exposed = [request_id.HEADER, "Retry-After"]
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
