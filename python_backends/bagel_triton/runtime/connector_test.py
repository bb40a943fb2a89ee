"""The connector's self-test in a running server: the real thinker lends, the real DiT reads."""

from __future__ import annotations

import httpx

from bagel_triton.deploy.topology import DIT, THINKER
from bagel_triton.runtime.command_error import CommandError
from bagel_triton.runtime.ports import LOOPBACK

FIELD = "selftest"
TIMEOUT_S = 60.0


async def check(http_port: int) -> str:
    """The connector that carried a pattern from ``thinker`` to ``dit``, models of the Triton at ``http_port`` here.

    Raises:
        CommandError: it did not, with the stage's reason.
    """
    async with httpx.AsyncClient(trust_env=False, timeout=TIMEOUT_S) as client:
        lease = await _ask(client, http_port, THINKER, "lend")
        return await _ask(client, http_port, DIT, lease)


async def _ask(client: httpx.AsyncClient, port: int, model: str, text: str) -> str:
    try:
        answer = await client.post(f"http://{LOOPBACK}:{port}/v2/models/{model}/generate", json={FIELD: text})
        body = answer.json()
        if answer.is_success and FIELD in body:
            return str(body[FIELD])
        reason = body.get("error", body)
    except (httpx.HTTPError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
    raise CommandError(f"the KV connector's self-test failed at {model}: {reason}")
