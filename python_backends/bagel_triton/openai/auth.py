"""API keys: requests without one are refused."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Callable, Sequence

import msgspec
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from bagel_triton.openai.errors import ErrorBody, error_detail

UNAUTHORIZED = 401


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
        await Response(body, UNAUTHORIZED, headers, media_type="application/json")(scope, receive, send)

    def _digest(self, key: str) -> bytes:
        return hmac.digest(self._secret, key.encode(), hashlib.sha256)

    def _knows(self, key: str) -> bool:
        digest = self._digest(key)
        found = False
        for known in self._digests:
            found |= hmac.compare_digest(digest, known)
        return found
