"""The connector's self-test in a running server: the real thinker lends, the real DiT reads."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import numpy as np

from bagel_triton.deploy.topology import DIT, THINKER
from bagel_triton.protocol.errors import BagelError, StageUnavailable
from bagel_triton.triton.client import TritonServer

FIELD = "selftest"
TIMEOUT_S = 60.0


async def check(addresses: Mapping[str, str]) -> str:
    """The connector that carried a pattern from ``thinker`` to ``dit``, models at gRPC ``addresses``.

    Raises:
        StageUnavailable: it did not, with the stage's reason.
    """
    lease = await _ask(addresses[THINKER], THINKER, "lend")
    return await _ask(addresses[DIT], DIT, lease)


async def _ask(address: str, model: str, text: str) -> str:
    server = TritonServer(address)
    arrays = {FIELD: np.array([text.encode()], dtype=np.object_)}
    try:
        answer = await asyncio.to_thread(server.infer, model, arrays, [FIELD], "", TIMEOUT_S)
    except BagelError as error:
        raise StageUnavailable(f"the KV connector's self-test failed at {model}: {error.message}") from error
    finally:
        server.close()
    if FIELD not in answer:
        raise StageUnavailable(f"the KV connector's self-test failed at {model}: it answered nothing")
    return bytes(answer[FIELD].reshape(-1)[0]).decode()
