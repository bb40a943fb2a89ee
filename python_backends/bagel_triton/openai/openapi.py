"""``/openapi.json`` and ``/docs``: the API described by the schemas that check it.

Bodies come from the pydantic models, with what their validators accept beyond them: ``null`` for
any field, the fields of :mod:`noop_fields`, and the shorter spellings in ``_SHORT_FORMS``.
Limits come from :mod:`bagel_triton.protocol.request`, replies from the structs that are sent.
"""

from __future__ import annotations

import functools
import html
import json
from collections.abc import Callable
from typing import Any

import msgspec
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

import bagel_triton
from bagel_triton.openai import admin
from bagel_triton.openai.chat_schema import MAX_MODALITIES, WRAPPERS, ChatBody
from bagel_triton.openai.endpoint import Api
from bagel_triton.openai.errors import ErrorBody
from bagel_triton.openai.images import FILES, ImagesReply
from bagel_triton.openai.images_schema import EditsBody, ImagesBody, JsonEditsBody
from bagel_triton.openai.noop_fields import IGNORED, NOOP
from bagel_triton.openai.reply import ChatCompletion
from bagel_triton.openai.responses_schema import ResponsesBody
from bagel_triton.openai.schema import FIELD_NAMES, GenerationFields, StrictModel, choosing_fields
from bagel_triton.protocol.request import ASPECT_RATIO, MAX_BIASED_TOKENS, MAX_INPUT_IMAGES, MAX_STOPS, REQUEST_FIELDS

Json = dict[str, Any]
SCHEMAS = "#/components/schemas/"
BODIES: tuple[type[BaseModel], ...] = (ChatBody, ImagesBody, EditsBody, JsonEditsBody, ResponsesBody)
_TEXT: Json = {"type": "string"}
_NULL: Json = {"type": "null"}
_EMPTY: Json = {"enum": [""]}
_FOR_TEXT, _FOR_IMAGES = ("all", "text", "decoding"), ("all", "image")
# One pixel: what a generator of requests cannot guess.
_PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4z8AAAAMBAQDJ/pLvAAAAAElFTkSuQmCC"
_IMAGE: Json = {
    **_TEXT,
    "pattern": r"^\s*([dD][aA][tT][aA]:|[hH][tT][tT][pP][sS]?://)",
    "examples": [f"data:image/png;base64,{_PIXEL}"],
}
_LINK: Json = {"anyOf": [_IMAGE, {"$ref": SCHEMAS + "ImageLink"}]}
_LINKS: Json = {"type": "array", "items": _LINK, "minItems": 1, "maxItems": MAX_INPUT_IMAGES}
_MODALITIES: Json = {"type": "array", "items": {"enum": ["text", "image"]}, "maxItems": MAX_MODALITIES}
_SIZE: Json = {**_TEXT, "pattern": r"^\s*(auto|1[kK]|[0-9]{1,6}\s*[xX*\u00d7]\s*[0-9]{1,6})?\s*$", "examples": ["auto"]}
_SIZE_OR_SIDES: Json = {"anyOf": [_SIZE, {"$ref": SCHEMAS + "ImageSize"}]}
_RATIO: Json = {**_TEXT, "pattern": rf"^(auto|match_input_image|{ASPECT_RATIO})$", "examples": ["auto"]}
_SIZES: dict[str, Json] = {"size": _SIZE, "image_size": _SIZE_OR_SIDES, "aspect_ratio": _RATIO}
# Declarations that take the place of pydantic's, by the names of the model and of the field.
_INSTEAD: dict[tuple[str, str], Json] = (
    {
        ("ChatBody", "modalities"): _MODALITIES,
        ("ImageConfig", "image_size"): _SIZE_OR_SIDES,
        ("ImageConfig", "aspect_ratio"): _RATIO,
        ("ImageUrl", "url"): _IMAGE,
        ("InputImage", "image_url"): _IMAGE,
        ("InputImageCall", "result"): {**_TEXT, "examples": [_PIXEL]},
        ("ImageLink", "image_url"): _IMAGE,
        ("ResponsesBody", "top_logprobs"): {"enum": [0]},
    }
    | {
        (body, name): schema
        for body in ("ImageTool", *(body.__name__ for body in BODIES))
        for name, schema in _SIZES.items()
    }
    | {
        ("ResponsesBody", name): {"enum": [1], "description": "The tool takes more."}
        for name in ("n", *REQUEST_FIELDS["n"].aliases)
    }
)
# What a field takes besides its declared type.
_SHORT_FORMS: dict[tuple[str, str], list[Json]] = {
    ("ChatMessage", "content"): [_TEXT],
    ("ImagePart", "image_url"): [_IMAGE],
    ("InputMessage", "content"): [_TEXT],
    ("ResponsesBody", "input"): [{**_TEXT, "pattern": r"\S"}],
    **{(body, "lora"): [{"enum": [{}]}] for body in ("ImageTool", *(body.__name__ for body in BODIES))},
}
# The requests that a body makes unless it says otherwise: fields for others have no effect with any value.
_EFFECTIVE = {"ChatBody": _FOR_TEXT, "ResponsesBody": _FOR_TEXT}


def routes(api: Api, is_open: Callable[[str], bool]) -> list[Route]:
    """The routes of both; ``is_open`` says which paths need no key."""
    document = functools.cache(lambda: describe(api, is_open))  # built on first use: it takes a while

    async def openapi(request: Request) -> Response:
        return JSONResponse(document())

    async def docs(request: Request) -> Response:
        page = _page(document())
        policy = "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'; base-uri 'none'"
        return HTMLResponse(page, headers={"Content-Security-Policy": policy})

    return [Route("/openapi.json", openapi, methods=["GET"]), Route("/docs", docs, methods=["GET"])]


def describe(api: Api, is_open: Callable[[str], bool]) -> Json:
    """The OpenAPI 3.1 document of this API."""
    _, pydantic = models_json_schema([(body, "validation") for body in BODIES], ref_template=SCHEMAS + "{model}")
    _, structs = msgspec.json.schema_components(
        [ChatCompletion, ImagesReply, ErrorBody], ref_template=SCHEMAS + "Reply{name}"
    )
    schemas: Json = {name: _accepted(name, schema, api) for name, schema in pydantic["$defs"].items()}
    schemas |= {f"Reply{name}": schema for name, schema in structs.items()}
    schemas["EditsForm"] = _form(schemas["EditsBody"])
    parts = schemas["ChatMessage"]["properties"]["content"]["anyOf"][0]
    parts["items"] = {"anyOf": [parts["items"], _TEXT]}
    edit = schemas["JsonEditsBody"]
    edit["properties"] |= {name: {"anyOf": [*_LINK["anyOf"], _LINKS]} for name in ("image", "images")}
    edit["oneOf"] = [{"required": ["image"]}, {"required": ["images"]}]
    for name, fields in (("LoadAdapter", ["lora_name", "lora_path"]), ("UnloadAdapter", ["lora_name"])):
        schemas[name] = {"type": "object", "required": fields, "properties": dict.fromkeys(fields, _TEXT)}
    schemas["Response"] = {"type": "object", "required": ["id", "object", "status", "output", "model", "created_at"]}
    document: Json = {
        "openapi": "3.1.0",
        "info": {
            "title": "bagel-triton",
            "version": bagel_triton.__version__,
            "description": "BAGEL-7B-MoT on Triton: text and images in and out, in the shapes of OpenAI's API.",
        },
        "paths": _paths(),
        "components": {"schemas": schemas},
    }
    if api.settings.http.api_keys:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
        for path in filter(is_open, document["paths"]):
            _secure(document["paths"][path], [])
    if api.settings.http.admin_api_keys:
        schemes = document["components"].setdefault("securitySchemes", {})
        schemes["admin"] = {"type": "http", "scheme": "bearer"}
    for path in admin.PATHS:
        _secure(document["paths"][path], [{"admin": []}] if api.settings.http.admin_api_keys else [])
    return document


def _secure(operations: Json, security: list[Json]) -> None:
    for operation in operations.values():
        operation["security"] = security


def _accepted(name: str, schema: Json, api: Api) -> Json:
    """``schema`` of the model ``name`` with everything that the model accepts."""
    model = next((known for known in _models() if known.__name__ == name), None)
    if model is None or "properties" not in schema:
        return schema
    required = schema.get("required", [])
    properties = {}
    for field, declared in schema["properties"].items():
        notes = {key: value for key, value in declared.items() if key in ("title", "description")}
        accepted = notes | _INSTEAD[name, field] if (name, field) in _INSTEAD else declared
        if issubclass(model, GenerationFields):
            accepted = _limited(field, accepted, _EFFECTIVE.get(name, _FOR_IMAGES))
        if field == "model" and issubclass(model, GenerationFields):
            accepted = {**accepted, "anyOf": [{"enum": list(api.model_names)}]}
        shorter = _SHORT_FORMS.get((name, field), [])
        if field == "stop":
            shorter = [_TEXT]
        elif issubclass(model, StrictModel) and field in choosing_fields(model):
            shorter = [*shorter, _EMPTY]
        properties[field] = _union(accepted, [*shorter, *([] if field in required else [_NULL])])
    place = getattr(model, "place", "")
    for field in sorted(IGNORED.get(place, ())):
        properties.setdefault(field, {"description": "Accepted without effect."})
    for field, noop in NOOP.get(place, {}).items():
        properties.setdefault(field, {"enum": [*noop.values, "", None], "description": f"Otherwise: {noop.instead}."})
    if name == "ChatBody":
        extra = {"type": ["object", "null"], "description": "Fields of the body, read as if they stood beside it."}
        properties |= dict.fromkeys(WRAPPERS, extra)
    # null means "not given" for every field
    return {**schema, "properties": properties, "additionalProperties": _NULL}


def _models() -> list[type[BaseModel]]:
    """Every model that a body is made of."""
    found: list[type[BaseModel]] = []
    waiting: list[type[BaseModel]] = [BaseModel]
    while waiting:
        children = waiting.pop().__subclasses__()
        found += children
        waiting += children
    return [model for model in found if model.__module__.startswith(__package__)]


def _limited(name: str, declared: Json, effective: tuple[str, ...]) -> Json:
    """``declared`` with the limits of the request field ``name``, if it has an effect on its own."""
    if name == "logit_bias":
        keys = {"propertyNames": {"pattern": "^[0-9]{1,9}$"}, "maxProperties": MAX_BIASED_TOKENS}
        return {**declared, "anyOf": [{**member, **keys} for member in declared["anyOf"] if member != _NULL]}
    known = "max_tokens" if name == "max_output_tokens" else FIELD_NAMES.get(name, "")
    field = REQUEST_FIELDS.get(known)
    if field is None or field.affects not in effective or known in ("partial_images", "top_logprobs"):
        return declared
    limits: Json = {}
    if known == "stop":
        limits = {"items": {**_TEXT, "minLength": 1}, "maxItems": MAX_STOPS}
    elif known in ("height", "width"):
        limits = {"minimum": 16, "multipleOf": 16}
    elif field.choices:
        limits = {"enum": list(field.choices)}
    elif field.bounds is not None:
        low, high = field.bounds
        limits = {"exclusiveMinimum" if field.above else "minimum": low, "maximum": high}
    members = declared.get("anyOf", [])
    limited = [{**member, **limits} if member.get("type") != "null" else member for member in members]
    if field.unset is not None:
        limited.append({"enum": [field.unset]})
    return {**declared, "anyOf": limited} if members else {**declared, **limits}


def _union(schema: Json, others: list[Json]) -> Json:
    """``schema``, or one of the ``others``."""
    if not others:
        return schema
    notes = {name: value for name, value in schema.items() if name in ("description", "title", "default")}
    rest = {name: value for name, value in schema.items() if name not in notes}
    members = list(rest["anyOf"]) if set(rest) == {"anyOf"} else [rest]
    return {**notes, "anyOf": [*members, *(other for other in others if other not in members)]}


def _form(body: Json) -> Json:
    """The form of an edit: the fields of ``body`` and files."""
    file = {"type": "string", "format": "binary"}
    files = {"type": "array", "items": file, "minItems": 1, "maxItems": MAX_INPUT_IMAGES}
    return {**body, "properties": {**body["properties"], "image": files}, "required": ["prompt", "image"]}


def _paths() -> Json:
    def reference(name: str) -> Json:
        return {"schema": {"$ref": SCHEMAS + name}}

    def reply(description: str, schema: Json) -> Json:
        return {"description": description, "content": {"application/json": schema}}

    error = reply("An error, in OpenAI's shape", reference("ReplyErrorBody"))
    events: Json = {"text/event-stream": {}}
    any_json = {"schema": {"type": "object"}}

    def post(summary: str, answer: str, *bodies: tuple[str, str]) -> Json:
        done = reply("The reply, or with stream=true its events", reference(answer))
        done["content"] |= events
        content = {kind: reference(body) for kind, body in bodies}
        return {
            "post": {
                "summary": summary,
                "requestBody": {"required": True, "content": content},
                "responses": {"200": done, "default": error},
            }
        }

    def get(summary: str, parameters: tuple[str, ...] = (), answers: Json | None = None) -> Json:
        named = [{"name": name, "in": "path", "required": True, "schema": _TEXT} for name in parameters]
        found = {"200": reply("As described", any_json)} | (answers or {})
        return {"get": {"summary": summary, "parameters": named, "responses": {**found, "default": error}}}

    json_body, form_body = "application/json", "multipart/form-data"
    awake = reply("Its state", any_json)
    unready = {"503": reply("Not ready", any_json)}
    image = {f"image/{kind}": {"schema": {"type": "string", "format": "binary"}} for kind in ("png", "jpeg", "webp")}
    text = {"200": {"description": "The page", "content": {"text/plain": {"schema": _TEXT}}}}
    page = {"200": {"description": "The page", "content": {"text/html": {"schema": _TEXT}}}}
    return {
        "/v1/chat/completions": post(
            "Text and images, from a conversation", "ReplyChatCompletion", (json_body, "ChatBody")
        ),
        "/v1/images/generations": post("Images from a prompt", "ReplyImagesReply", (json_body, "ImagesBody")),
        "/v1/images/edits": post(
            "Images from images and a prompt",
            "ReplyImagesReply",
            (form_body, "EditsForm"),
            (json_body, "JsonEditsBody"),
        ),
        FILES + "{name}": get(
            "An image requested as a URL", ("name",), {"200": {"description": "It", "content": image}}
        ),
        "/v1/responses": post("Text, thinking and images as items", "Response", (json_body, "ResponsesBody")),
        "/v1/models": get("The model, once"),
        "/v1/models/{model}": get("The model, by any of its names", ("model",)),
        "/v1/sleep": {**get("Whether the server sleeps"), **_sleep(any_json, error)},
        "/v1/wake": {"post": {"summary": "Wake the server", "responses": {"200": awake, "default": error}}},
        "/sleep": _sleep(any_json, error),
        "/wake_up": {"post": {"summary": "As /v1/wake", "responses": {"200": awake, "default": error}}},
        "/is_sleeping": get("Whether the server sleeps, as vLLM has it"),
        "/v1/load_lora_adapter": _adapter("Load a LoRA adapter", "LoadAdapter", text, error),
        "/v1/unload_lora_adapter": _adapter("Unload a LoRA adapter", "UnloadAdapter", text, error),
        "/health": get("Whether every stage is ready", answers=unready),
        "/health/ready": get("The same", answers=unready),
        "/health/live": get("That this process answers"),
        "/ping": {**get("As /health", answers=unready), "post": get("As /health", answers=unready)["get"]},
        "/metrics": get("Triton's metrics and the API's own, for Prometheus", answers=text),
        "/version": get("The server's version"),
        "/openapi.json": get("This document"),
        "/docs": get("This document, to read", answers=page),
    }


def _sleep(state: Json, error: Json) -> Json:
    level = {"name": "level", "in": "query", "schema": {"enum": [1, 2], "default": 1}}
    done = {"description": "Its state", "content": {"application/json": state}}
    operation = {"summary": "Free the server's memory", "parameters": [level]}
    return {"post": {**operation, "responses": {"200": done, "default": error}}}


def _adapter(summary: str, name: str, done: Json, error: Json) -> Json:
    body = {"required": True, "content": {"application/json": {"schema": {"$ref": f"{SCHEMAS}{name}"}}}}
    return {"post": {"summary": summary, "requestBody": body, "responses": {**done, "default": error}}}


def _page(document: Json) -> str:
    """``document`` as a page without scripts and without anything from elsewhere."""
    schemas = document["components"]["schemas"]
    parts = [f"<h1>{html.escape(document['info']['title'])} {html.escape(document['info']['version'])}</h1>"]
    parts.append(f"<p>{html.escape(document['info']['description'])} <a href='openapi.json'>openapi.json</a></p>")
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            parts.append(f"<h2><code>{method.upper()} {html.escape(path)}</code></h2>")
            parts.append(f"<p>{html.escape(operation['summary'])}</p>")
            for kind, content in operation.get("requestBody", {}).get("content", {}).items():
                schema = schemas[content["schema"]["$ref"].removeprefix(SCHEMAS)]
                parts.append(f"<details><summary>{html.escape(kind)}</summary>{_table(schema)}</details>")
    style = (
        "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
        "table{border-collapse:collapse}td,th{text-align:left;vertical-align:top;padding:.2rem .8rem .2rem 0}"
        ":root{color-scheme:light dark}summary{cursor:pointer}"
    )
    meta = "<meta charset='utf-8'><meta name='viewport' content='width=device-width'>"
    head = f"{meta}<title>API</title><style>{style}</style>"
    return f"<!doctype html><html lang='en'><head>{head}</head><body>{''.join(parts)}</body></html>"


def _table(schema: Json) -> str:
    rows = "".join(
        f"<tr><td><code>{html.escape(name)}</code></td><td>{html.escape(_kind(field))}</td>"
        f"<td>{html.escape(field.get('description', ''))}</td></tr>"
        for name, field in schema["properties"].items()
    )
    return f"<table><tr><th>field</th><th>type</th><th>meaning</th></tr>{rows}</table>"


def _kind(field: Json) -> str:
    """The types of ``field``, in a few words."""
    if "anyOf" in field:
        return " or ".join(dict.fromkeys(_kind(member) for member in field["anyOf"] if member != _NULL))
    if "$ref" in field:
        return str(field["$ref"].rpartition("/")[2])
    if "enum" in field:
        return ", ".join(json.dumps(value) for value in field["enum"] if value is not None)
    if field.get("type") == "array":
        return f"list of {_kind(field.get('items', {}))}"
    kind = field.get("type", "anything")
    return kind if isinstance(kind, str) else " or ".join(kind)
