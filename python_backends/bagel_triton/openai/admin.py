"""What the endpoints have in common that change the server: an admin key, and small JSON bodies."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import msgspec
from starlette.requests import Request

from bagel_triton.openai.endpoint import Api
from bagel_triton.protocol.errors import InvalidRequest

ADAPTER_PATHS = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter")
#: Paths that need an admin key, and no other.
PATHS = ("/v1/sleep", "/v1/wake", "/sleep", "/wake_up", "/is_sleeping", *ADAPTER_PATHS)
MAX_BODY = 16 * 1024


class AdminKeyNeeded(InvalidRequest):
    """The server has no admin key, so no request may change its state."""

    http_status = 403


def check_key(api: Api) -> None:
    """Refuse a change of a server without an admin key; where there is one, the request has been checked for it.

    Raises:
        AdminKeyNeeded: there is none.
    """
    if not api.settings.http.admin_api_keys:
        flags = "--admin-api-key, --admin-api-key-file or $BAGEL_ADMIN_API_KEY"
        raise AdminKeyNeeded(f"this server has no admin key; start it with {flags}")


async def json_body(request: Request, known: Collection[str], example: str) -> Mapping[str, Any]:
    """The fields of the JSON object in the body; none without a body.

    Raises:
        InvalidRequest: it is too long or no such object, or has other fields than those ``known``.
    """
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY:
            raise InvalidRequest(f"the body has more than {MAX_BODY} bytes; allowed: {example}")
    try:
        found = msgspec.json.decode(bytes(body) or b"{}")
    except msgspec.DecodeError as error:
        raise InvalidRequest(f"the body is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise InvalidRequest.value("body", found, "a JSON object")
    for name in found:
        if name not in known:
            raise InvalidRequest.unknown(name, name, known)
    return found
