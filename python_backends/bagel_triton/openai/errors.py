"""Errors as OpenAI clients know them: one JSON shape, one HTTP status per kind.

Pydantic's findings become the same errors, and the error for a wrong path names the right one.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import msgspec
from pydantic import ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from bagel_triton.openai import request_log
from bagel_triton.protocol.errors import (
    Asleep,
    BagelError,
    InvalidRequest,
    Overloaded,
    format_value,
    from_exception,
    truncate,
)

log = logging.getLogger(__name__)
MAX_LOGGED = 1000  # characters


class BodyTooLarge(InvalidRequest):
    """The request body has more bytes than the proxy takes."""

    http_status = 413


class NotFound(InvalidRequest):
    """A file that the request names is not there."""

    http_status = 404


class UnsupportedEncoding(InvalidRequest):
    """The request body is compressed."""

    http_status = 415


class HeaderTooLarge(InvalidRequest):
    """The request's header has more bytes than the proxy takes."""

    http_status = 431


class RequestTimeout(InvalidRequest):
    """The client took too long to send the request."""

    http_status = 408


class ErrorDetail(msgspec.Struct, frozen=True):
    """OpenAI's error object; ``code`` is the error's kind in snake case, ``request_id`` that of the log."""

    message: str
    type: str
    param: str | None
    code: str
    request_id: str | msgspec.UnsetType = msgspec.UNSET


class ErrorBody(msgspec.Struct, frozen=True):
    """The body of an error reply."""

    error: ErrorDetail


def error_detail(message: str, kind: str, param: str | None, code: str) -> ErrorDetail:
    """OpenAI's error object, with the id of the request at hand."""
    message, param = _encodable(message), None if param is None else _encodable(param)
    return ErrorDetail(message, kind, param, code, request_log.CURRENT.get() or msgspec.UNSET)


def _encodable(text: str) -> str:
    """``text`` with half characters escaped: a request may hold some, and no reply can."""
    return text.encode(errors="backslashreplace").decode()


def error_body(error: BagelError) -> ErrorBody:
    """``error`` in OpenAI's shape."""
    code = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", error.kind).lower()
    return ErrorBody(error_detail(error.message, error.openai_type, error.param, code))


def to_bagel_error(error: Exception) -> BagelError:
    """``error`` as a typed error. It is logged: in one line if it was typed, else with its traceback."""
    typed = from_exception(error)
    text = f"{typed.kind}: {typed.message}"[:MAX_LOGGED]
    # A user's own words must neither make up a line nor colour one.
    line = "".join(character if character.isprintable() else " " for character in text)
    log.log(
        logging.ERROR if typed.http_status >= 500 else logging.WARNING,
        "%d %s",
        typed.http_status,
        line,
        exc_info=None if typed is error else error,
    )
    return typed


def error_response(error: BagelError, retry_after_s: int) -> Response:
    """The HTTP response for ``error``."""
    headers = {"Retry-After": str(retry_after_s)} if isinstance(error, Overloaded | Asleep) else None
    return _json(error_body(error), error.http_status, headers)


async def http_exception(request: Request, error: Exception, known: Iterable[str] = ()) -> Response:
    """The router's refusals (no such path, wrong method) in the same shape; ``known`` are the paths there are."""
    assert isinstance(error, HTTPException)
    path = request.url.path
    message = f"{request.method} {truncate(path)}: {error.detail}"
    if allowed := (error.headers or {}).get("Allow"):
        message += f"; allowed: {allowed}"
    if error.status_code == 404:
        message += f"; {hint(path, known)}"
    return _json(error_body(InvalidRequest(message)), error.status_code, error.headers)


def _json(body: ErrorBody, status: int, headers: Mapping[str, str] | None) -> Response:
    return Response(msgspec.json.encode(body), status, headers, media_type="application/json")


_Context = Mapping[str, Any]
_UNKNOWN_FIELD, _NOOP_FIELD = "unknown_field", "noop_field"
_TYPES = {
    "bool_type": "true or false",
    "finite_number": "a finite number",
    "float_type": "a number",
    "int_type": "an integer",
    "list_type": "a list",
    "model_attributes_type": "an object",
    "model_type": "an object",
    "dict_type": "an object",
    "mapping_type": "an object",
    "string_type": "a text",
    "string_unicode": "a text of whole Unicode characters",
    "tuple_type": "a list",
}
_RULES: dict[str, Callable[[_Context], str]] = {
    "greater_than": lambda context: f"more than {context['gt']}",
    "greater_than_equal": lambda context: f"at least {context['ge']}",
    "less_than": lambda context: f"less than {context['lt']}",
    "less_than_equal": lambda context: f"at most {context['le']}",
    "literal_error": lambda context: context["expected"],
    "not_allowed": lambda context: context["allowed"],
    "too_long": lambda context: f"at most {context['max_length']} elements",
    "too_short": lambda context: f"at least {context['min_length']} elements",
    "union_tag_invalid": lambda context: context["expected_tags"],
}


def not_allowed(allowed: str) -> PydanticCustomError:
    """The error of a validator, with the values it accepts."""
    return PydanticCustomError("not_allowed", "not allowed", {"allowed": allowed})


def unknown_field(name: str, known: list[str]) -> PydanticCustomError:
    """The error of a model for a field ``name`` that is not among the ``known``."""
    return PydanticCustomError(_UNKNOWN_FIELD, "unknown field", {"name": name, "known": known})


def noop_field(name: str, value: Any, noop: Sequence[Any], instead: str) -> PydanticCustomError:
    """The error of a model for a field ``name`` that is accepted only with a value of ``noop``."""
    allowed = " or ".join(map(format_value, noop))
    context = {"name": name, "value": value, "allowed": f"allowed: {allowed}; {instead}" if allowed else instead}
    return PydanticCustomError(_NOOP_FIELD, "not supported", context)


def to_invalid_request(error: ValidationError) -> InvalidRequest:
    """The first finding of ``error`` as the error a client receives."""
    finding = error.errors(include_url=False)[0]
    kind, location, context = finding["type"], _untagged(finding["loc"]), finding.get("ctx", {})
    if kind == "json_invalid":
        return InvalidRequest(f"the body is not JSON: {context['error']}")
    if kind == _UNKNOWN_FIELD:
        name = context["name"]
        return InvalidRequest.unknown(path((*location, name)), name, sorted(context["known"]))
    if kind == _NOOP_FIELD:
        name = path((*location, context["name"]))
        shown = format_value(context["value"])
        return InvalidRequest(f"{name}={shown} is not supported; {context['allowed']}", name)
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        location = (*location, "type")
    if kind == "missing" and isinstance(location[-1], int):  # an element, and the input is the list
        return InvalidRequest.value(path(location[:-1]), finding["input"], f"at least {location[-1] + 1} elements")
    param = path(location)
    if kind in ("missing", "union_tag_not_found"):
        return InvalidRequest(f"{param} is required", param)
    if not location:
        return InvalidRequest.value("body", finding["input"], "a JSON object")
    return InvalidRequest.value(param, _value(finding), _allowed(finding))


def path(location: tuple[int | str, ...]) -> str:
    """``("messages", 0, "role")`` as ``messages[0].role``."""
    text = ""
    for step in location:
        text += f"[{step}]" if isinstance(step, int) else f".{step}" if text else step
    return text


_UNIONS = ("content", "input")  # lists of tagged unions


def _untagged(location: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """``location`` without the names of unions' members, which pydantic puts after an element's index or a field."""
    return tuple(
        step
        for at, step in enumerate(location)
        if not (at and location[at - 1] == "image_size" and step in ("text", "sides"))
        and (at < 2 or not (isinstance(location[at - 1], int) and location[at - 2] in _UNIONS))
    )


def _value(finding: ErrorDetails) -> object:
    return finding["ctx"]["tag"] if finding["type"] == "union_tag_invalid" else finding["input"]


def _allowed(finding: ErrorDetails) -> str:
    kind = finding["type"]
    if kind in _TYPES:
        return _TYPES[kind]
    return _RULES[kind](finding["ctx"]) if kind in _RULES else finding["msg"]


CHAT, IMAGES = "POST /v1/chat/completions", "POST /v1/images/generations"
# Endpoints of OpenAI's API that this model does not have, and what to call instead.
_INSTEAD = {
    "/v1/completions": f"this API has no text completions; use {CHAT}, which takes a prompt as one user message",
    "/v1/embeddings": "this model makes no embeddings",
    "/v1/moderations": "this server moderates nothing",
    "/v1/audio": f"this model has no audio; it reads and writes text and images: {CHAT}",
    "/v1/realtime": f"this model has no audio; use {CHAT} with stream=true",
    "/v1/images/variations": "this API has no variations; use POST /v1/images/edits with a prompt",
    "/healthz": "use GET /health",
    "/readyz": "use GET /health/ready",
    "/livez": "use GET /health/live",
    "/redoc": "use GET /docs",
    "/tokenize": "this API counts no tokens by themselves; every reply has its usage",
    "/sdapi": f"this is not A1111's API; use {IMAGES}",
    "/v1/files": "this server keeps no files; send an image as a data: URL",
    "/v1/batches": "this server has no batches; send requests at once, they are batched as they come",
    "/v1/chat/completions/batch": f"send each conversation to {CHAT}, all at once: they are batched as they come",
    "/v1/omni/sleep": "use POST /v1/sleep, for all stages at once",
    "/v1/omni/wakeup": "use POST /v1/wake, for all stages at once",
    "/v1/assistants": f"this server keeps no state; use {CHAT}",
    "/v1/threads": f"this server keeps no state; use {CHAT}",
    "/v1/conversations": "this server keeps no state; use POST /v1/responses with the whole input",
    "/v1/responses": "this server keeps no responses; only POST /v1/responses exists",
    "/v1/fine_tuning": "this server does not train",
    "/v1/messages": f"this is not Anthropic's API; use {CHAT}",
    "/v1/engines": "engines are gone from OpenAI's API; use GET /v1/models",
    "/api": f"this is not Ollama's API; use {CHAT}",
    "/openai/deployments": f"this is not Azure's API; use OpenAI's own client, which calls {CHAT}",
    "/v2": "this is the OpenAI API; Triton's own HTTP API is on its own port (--triton-http-port)",
}


def hint(path: str, known: Iterable[str]) -> str:
    """The path that a request for ``path``, which is none of the ``known`` ones, should have."""
    paths = frozenset(known)
    found = next((near for near in _candidates(path) if near in paths), None)
    if found is not None:
        base = " (a client's base URL ends in /v1, once, without a slash)" if found.startswith("/v1/") else ""
        return f"did you mean {found}?{base}"
    for near in _candidates(path):
        for prefix, advice in _INSTEAD.items():
            if near == prefix or near.startswith(f"{prefix}/"):
                return advice
    if path.rstrip("/") in ("/v1", ""):
        return f"the endpoints are {CHAT}, {IMAGES} and others: GET /docs lists them"
    return "GET /docs lists the endpoints"


def _candidates(path: str) -> list[str]:
    """``path`` without the usual slips of a base URL: slashes too many, /v1 twice or not at all."""
    clean = re.sub(r"/+", "/", path).rstrip("/")
    once = re.sub(r"^(/(openai|api))?(/v1)+(?=/|$)", "/v1", clean)
    return [clean, once, f"/v1{clean}", once.removeprefix("/v1")]
