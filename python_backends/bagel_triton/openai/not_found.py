"""What a 404 or a 405 says besides that: where the request should have gone."""

from __future__ import annotations

import re
from collections.abc import Iterable

CHAT, IMAGES = "POST /v1/chat/completions", "POST /v1/images/generations"
# Endpoints of OpenAI's API that this model does not have, and what to call instead.
_INSTEAD = {
    "/v1/completions": f"this API has no text completions; use {CHAT}, which takes a prompt as one user message",
    "/v1/embeddings": "this model makes no embeddings",
    "/v1/moderations": "this server moderates nothing",
    "/v1/audio": f"this model has no audio; it reads and writes text and images: {CHAT}",
    "/v1/realtime": f"this model has no audio; use {CHAT} with stream=true",
    "/v1/images/variations": "this API has no variations; use POST /v1/images/edits with a prompt",
    "/v1/files": "this server keeps no files; send an image as a data: URL",
    "/v1/batches": "this server has no batches; send requests at once, they are batched as they come",
    "/v1/assistants": f"this server keeps no state; use {CHAT}",
    "/v1/threads": f"this server keeps no state; use {CHAT}",
    "/v1/conversations": "this server keeps no state; use POST /v1/responses with the whole input",
    "/v1/responses": "this server keeps no responses; only POST /v1/responses exists",
    "/v1/fine_tuning": "this server does not train",
    "/v1/messages": f"this is not Anthropic's API; use {CHAT}",
    "/v1/engines": "engines are gone from OpenAI's API; use GET /v1/models",
    "/api": f"this is not Ollama's API; use {CHAT}",
    "/v2": "this is the OpenAI API; Triton's own HTTP API is on its own port (--triton-http-port)",
}


def hint(path: str, known: Iterable[str]) -> str:
    """Where a request for ``path``, which is none of the ``known`` paths, should go."""
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
