"""What is served and whether it is ready: ``/v1/models``, ``/version``, ``/health``, ``/ping`` and ``/metrics``."""

from __future__ import annotations

from typing import Any

import httpx
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

import bagel_triton
from bagel_triton.openai.endpoint import Api
from bagel_triton.openai.request_log import CONTENT_TYPE, HttpMetrics
from bagel_triton.protocol.errors import StageUnavailable

MODALITIES = ("text", "image")
ARCHITECTURE = {
    "modality": "text+image->text+image",
    "input_modalities": list(MODALITIES),
    "output_modalities": list(MODALITIES),
}
OPEN_PATHS = ("/health", "/health/live", "/health/ready", "/ping")  # they need no key
METRICS_TIMEOUT_S = 5.0


def routes(api: Api, metrics: HttpMetrics) -> list[Route]:
    """The endpoints' routes."""
    return [*_model_routes(api), *_health_routes(api, metrics)]


def _model_routes(api: Api) -> list[Route]:
    def entry(name: str) -> dict[str, Any]:
        canonical, *aliases = api.settings.served_model_names
        return {
            "id": name,
            "object": "model",
            "created": api.created,
            "owned_by": "bagel-triton",
            "root": canonical,
            "aliases": aliases,
            "architecture": ARCHITECTURE,
        }

    @api.endpoint
    async def models(request: Request) -> Response:
        # One entry: a client that shows the list would show one model under each of its names.
        return JSONResponse({"object": "list", "data": [entry(api.settings.served_model_names[0])]})

    @api.endpoint
    async def model(request: Request) -> Response:
        return JSONResponse(entry(api.served_model(request.path_params["model"])))

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
