"""The connector's self-test in a running server: the real thinker lends, the real DiT reads."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Any

import grpc
import numpy as np
from tritonclient.grpc import InferInput
from tritonclient.grpc.aio import InferenceServerClient

from bagel_triton.deploy.topology import DIT, THINKER
from bagel_triton.protocol.errors import StageUnavailable
from bagel_triton.triton.client import CHANNEL_ARGS

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
    tensor = InferInput(FIELD, [1], "BYTES").set_data_from_numpy(np.array([text.encode()], dtype=np.object_))
    reason = "it answered nothing"
    async with InferenceServerClient(address, channel_args=CHANNEL_ARGS) as client:
        responses = client.stream_infer(_once({"model_name": model, "inputs": [tensor]}))
        try:
            async with asyncio.timeout(TIMEOUT_S):
                async for result, error in responses:
                    if error is not None:
                        reason = error.message()
                        break
                    if (answer := result.as_numpy(FIELD)) is not None:
                        return bytes(answer.reshape(-1)[0]).decode()
        except TimeoutError:
            reason = f"it was silent for {TIMEOUT_S:g} s"
        except grpc.RpcError as error:
            reason = f"{error.code().name}: {error.details()}"
        finally:
            responses.cancel()
    raise StageUnavailable(f"the KV connector's self-test failed at {model}: {reason}")


async def _once(call: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    yield call
