"""Triton's model repository, as its HTTP API lets it be changed while it serves."""

from __future__ import annotations

import asyncio
import time
from types import TracebackType
from typing import Self

import httpx

from bagel_triton.serving.ports import LOOPBACK

UNLOAD_TIMEOUT_S, LOAD_TIMEOUT_S = 10.0, 900.0
POLL_S = 0.05


class ReloadError(Exception):
    """A model could not be loaded anew."""


class ModelRepository:
    """The models of the Triton at ``http_port`` of this host."""

    def __init__(self, http_port: int) -> None:
        self._client = httpx.AsyncClient(
            base_url=f"http://{LOOPBACK}:{http_port}", trust_env=False, timeout=UNLOAD_TIMEOUT_S
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.aclose()

    async def reload(self, model: str) -> None:
        """Give ``model`` new processes; returns once it is ready.

        Models that build on it stay loaded, or are loaded again with it as ensembles are.

        Raises:
            ReloadError: it is not ready afterwards.
            TimeoutError: Triton did not answer in time.
        """
        try:
            await self._post(f"/v2/repository/models/{model}/unload", UNLOAD_TIMEOUT_S)
            # Not until it is gone: with a request that its dead process lost it never is,
            # and a new one can be loaded beside it all the same.
            deadline = time.monotonic() + UNLOAD_TIMEOUT_S
            while await self._ready(model):
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{model} was not unloaded within {UNLOAD_TIMEOUT_S:g} s")
                await asyncio.sleep(POLL_S)
            await self._post(f"/v2/repository/models/{model}/load", LOAD_TIMEOUT_S)
            if not await self._ready(model):
                raise ReloadError(f"{model} is not ready after it was loaded")
        except httpx.TimeoutException as error:
            raise TimeoutError(f"no answer about {model}") from error
        except httpx.TransportError as error:
            raise ReloadError(f"Triton does not answer: {error!r}") from error

    async def _post(self, path: str, timeout_s: float) -> None:
        answer = await self._client.post(path, json={}, timeout=timeout_s)
        if not answer.is_success:
            raise ReloadError(f"{path}: {answer.text}")

    async def _ready(self, model: str) -> bool:
        return (await self._client.get(f"/v2/models/{model}/ready")).is_success
