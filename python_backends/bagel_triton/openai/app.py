"""The HTTP API as an ASGI application: its routes, models and health among them, and its middleware."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import httpx
import msgspec
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Receive, Scope, Send

import bagel_triton
from bagel_triton.openai import admin, chat, images, lora, openapi, page, request_log, responses, sleep
from bagel_triton.openai.endpoint import Api, ReceiveBuffer
from bagel_triton.openai.errors import ErrorBody, error_detail, http_exception
from bagel_triton.openai.image_fetch import RemoteImages
from bagel_triton.openai.image_io import ImageLoader
from bagel_triton.openai.request_head import RequestHead
from bagel_triton.openai.request_log import CONTENT_TYPE, HttpMetrics, RequestLog
from bagel_triton.openai.settings import MIB, AllowedSources, HttpOptions, ProxySettings
from bagel_triton.protocol.errors import ModelNotFound, StageUnavailable
from bagel_triton.triton.client import Client, TritonClient

# Open without a key: the page and the API's description hold no secret (the page prompts for
# the key), and the name of a generated file cannot be guessed.
_OPEN_PATHS = ("/", "/docs", "/openapi.json", "/version", "/health", "/health/live", "/health/ready", "/ping")
_OPEN_PREFIXES = ("/page/", images.FILES)
METRICS_TIMEOUT_S = 5.0


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
        *status_routes(api, metrics),
        *sleep.routes(api),
        *lora.routes(api),
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
    around = [Middleware(RequestLog, metrics, options.access_log), Middleware(RequestHead)]
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
        around.append(Middleware(ApiKeys, options.api_keys, lambda path: is_open(path) or path in admin.PATHS))
    if options.admin_api_keys:
        around.append(Middleware(ApiKeys, options.admin_api_keys, lambda path: path not in admin.PATHS))
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


def status_routes(api: Api, metrics: HttpMetrics) -> list[Route]:
    """The endpoints' routes."""
    return [*_model_routes(api), *_health_routes(api, metrics)]


def _model_routes(api: Api) -> list[Route]:
    def entry(name: str) -> dict[str, Any]:
        canonical, *aliases = api.settings.served_model_names
        if name not in api.settings.served_model_names:  # an adapter's
            aliases = []
        return {
            "id": name,
            "object": "model",
            "created": api.created,
            "owned_by": "bagel-triton",
            "root": canonical,
            "parent": None if name in api.settings.served_model_names else canonical,
            "aliases": aliases,
            "max_model_len": api.max_model_len,
            "architecture": {
                "modality": f"text+image->{'+'.join(api.settings.output_modalities)}",
                "input_modalities": ["text", "image"],
                "output_modalities": list(api.settings.output_modalities),
            },
        }

    @api.endpoint
    async def models(request: Request) -> Response:
        # One entry for all names: a client that shows the list would show one model under each of them.
        await api.refresh_adapters()
        listed = (api.settings.served_model_names[0], *api.adapters)
        return JSONResponse({"object": "list", "data": [entry(name) for name in listed]})

    @api.endpoint
    async def model(request: Request) -> Response:
        if not (name := request.path_params["model"]):
            raise ModelNotFound(f"{request.url.path} names no model; did you mean /v1/models?", "model")
        if api.max_model_len is None:
            await api.refresh_adapters()
        return JSONResponse(entry(await api.served_model(name)))

    async def version(request: Request) -> Response:
        return JSONResponse({"version": bagel_triton.__version__})

    return [
        Route("/v1/models", models, methods=["GET"]),
        Route("/v1/models/{model:path}", model, methods=["GET"]),  # a name may hold a slash
        Route("/version", version, methods=["GET"]),
    ]


def _health_routes(api: Api, metrics: HttpMetrics) -> list[Route]:
    async def ready(request: Request) -> Response:
        try:
            found = await api.client.readiness()
        except StageUnavailable as error:
            models = dict.fromkeys(api.settings.models or ("bagel",), False)
            return JSONResponse({"status": "not ready", "models": models, "message": error.message}, 503)
        waiting = [name for name, is_ready in found.models.items() if not is_ready]
        body = {"models": found.models, **({"replicas": found.replicas} if found.replicas else {})}
        if waiting:
            return JSONResponse({"status": "not ready", **body, "message": f"not ready: {', '.join(waiting)}"}, 503)
        if found.asleep is not None:
            # vLLM's /health is 200 while it sleeps. A balancer must not choose a server that refuses.
            refuses = found.asleep.while_asleep == "refuse" and request.url.path == "/health/ready"
            drains = found.asleep.state in ("draining", "drained")
            return JSONResponse({"status": found.asleep.state if drains else "asleep", **body}, 503 if refuses else 200)
        return JSONResponse({"status": "ready", **body})

    async def live(request: Request) -> Response:
        return JSONResponse({"status": "live"})

    async def all_metrics(request: Request) -> Response:
        return Response(await _triton_metrics(api.settings.metrics_url) + metrics.page(), media_type=CONTENT_TYPE)

    return [
        Route("/health", ready, methods=["GET"]),
        Route("/health/ready", ready, methods=["GET"]),
        Route("/health/live", live, methods=["GET"]),
        Route("/ping", ready, methods=["GET", "POST"]),
        Route("/metrics", all_metrics, methods=["GET"]),
    ]


async def _triton_metrics(url: str | None) -> bytes:
    """Triton's page; a comment that says why where it cannot be had, so that the proxy's own are still there."""
    if url is None:
        return b"# Triton's metrics are left out: --triton-metrics says where they are\n"
    try:
        async with httpx.AsyncClient(trust_env=False, timeout=METRICS_TIMEOUT_S) as client:
            page = (await client.get(url)).raise_for_status().content
    except httpx.HTTPError as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        return f"# Triton's metrics at {url} cannot be had: {reason}\n".encode()
    return page if page.endswith(b"\n") else page + b"\n"
