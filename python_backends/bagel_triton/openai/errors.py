"""Errors as OpenAI clients know them: one JSON shape, one HTTP status per kind."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from bagel_triton.openai import request_id
from bagel_triton.openai.not_found import hint
from bagel_triton.protocol.errors import BagelError, InvalidRequest, Overloaded, from_exception, truncate

log = logging.getLogger(__name__)
MAX_LOGGED = 1000  # characters


class BodyTooLarge(InvalidRequest):
    """The request body has more bytes than the proxy takes."""

    http_status = 413


class NotFound(InvalidRequest):
    """A file that the request names is not there."""

    http_status = 404


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
    """What a client receives instead of a reply."""

    error: ErrorDetail


def error_detail(message: str, kind: str, param: str | None, code: str) -> ErrorDetail:
    """OpenAI's error object, with the id of the request at hand."""
    return ErrorDetail(message, kind, param, code, request_id.CURRENT.get() or msgspec.UNSET)


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
    headers = {"Retry-After": str(retry_after_s)} if isinstance(error, Overloaded) else None
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
