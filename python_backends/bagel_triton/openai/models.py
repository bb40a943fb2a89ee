"""``/v1/models`` and ``/version``: what is served."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

import bagel_triton
from bagel_triton.openai.endpoint import Api

MODALITIES = ("text", "image")
ARCHITECTURE = {
    "modality": "text+image->text+image",
    "input_modalities": list(MODALITIES),
    "output_modalities": list(MODALITIES),
}


def routes(api: Api) -> list[Route]:
    """The endpoints' routes."""

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
