"""Adapters loaded and unloaded over HTTP as vLLM has it, behind an admin key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from bagel_triton.openai.admin import ADAPTER_PATHS, check_key, json_body
from bagel_triton.openai.endpoint import Api, unless_gone
from bagel_triton.protocol.adapters import AdapterCall, check_name, is_a_models
from bagel_triton.protocol.errors import InvalidRequest

# Fields of vLLM's bodies beside these two, and their only values with an effect like its own.
_NOOP: Mapping[str, tuple[Any, ...]] = {
    "load_inplace": (False, None),
    "is_3d_lora_weight": (False, None),
    "lora_int_id": (None,),
}


def routes(api: Api) -> list[Route]:
    """The routes."""
    load_path, unload_path = ADAPTER_PATHS

    @api.endpoint
    async def load(request: Request) -> Response:
        name, path = await _fields(request, "lora_name", "lora_path")
        if is_a_models(name, api.settings.served_model_names):
            allowed = "another name than those of the model, and none that begins with one of them and a colon"
            raise InvalidRequest.value("lora_name", name, allowed)
        await unless_gone(request, api.change_adapters(AdapterCall("load", name, path)))
        return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")

    @api.endpoint
    async def unload(request: Request) -> Response:
        (name,) = await _fields(request, "lora_name")
        await unless_gone(request, api.change_adapters(AdapterCall("unload", name)))
        return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")

    async def _fields(request: Request, *names: str) -> tuple[str, ...]:
        check_key(api)
        example = "{" + ", ".join(f'"{name}": TEXT' for name in names) + "}"
        body = await json_body(request, (*names, *_NOOP), example)
        for name, values in _NOOP.items():
            if body.get(name) not in values:
                raise InvalidRequest.value(name, body[name], "null" if values == (None,) else "false")
        for name in names:
            if not isinstance(body.get(name), str):
                raise InvalidRequest.value(name, body.get(name), "a text")
        check_name(body["lora_name"])
        return tuple(body[name] for name in names)

    return [Route(load_path, load, methods=["POST"]), Route(unload_path, unload, methods=["POST"])]
