"""Reloads Triton models whose processes died."""

from __future__ import annotations

import asyncio
import math
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import httpx

from bagel_triton.ipc import liveness
from bagel_triton.ipc.shm import SHM_DIRECTORY
from bagel_triton.protocol.intervals import RELOAD_S, WATCH_S
from bagel_triton.serving import CommandError
from bagel_triton.serving.machine import LOOPBACK
from bagel_triton.serving.process import log_event

MAX_TRIES, STABLE_S = 5, 1.0
UNLOAD_TIMEOUT_S, LOAD_TIMEOUT_S = 10.0, 900.0


class RestartBudget:
    """Bounds restarts: at most :data:`MAX_TRIES` until one has lasted :data:`STABLE_S` seconds.

    More tries would not help, and a server that ends is noticed where one that looks alive is not. All times are
    seconds of one monotonic clock.
    """

    def __init__(self) -> None:
        self.count = 0
        self._back_at: float | None = None  # None while it is down

    def again(self, now: float) -> bool:
        """Count a death or a failed restart at ``now``; whether another try is allowed."""
        if self._back_at is not None and now - self._back_at >= STABLE_S:
            self.count = 0
        self._back_at = None
        if self.count == MAX_TRIES:
            return False
        self.count += 1
        return True

    def back(self, now: float) -> None:
        """Note a restart that succeeded at ``now``."""
        self._back_at = now


class ReloadError(Exception):
    """A model could not be reloaded; the message says why."""


class RestartNeeded(Exception):
    """Only a new tritonserver helps; the message says why."""


class Repository(Protocol):
    """Reloads models: :class:`ModelRepository`, or a test's own."""

    async def reload(self, model: str) -> None:
        """Raises :class:`ReloadError` where it cannot, and TimeoutError where Triton hangs."""


@dataclass
class _History:
    tries: RestartBudget = field(default_factory=RestartBudget)
    reloads: int = 0
    next_try_at: float = -math.inf


class Watchdog:
    """Watches the processes announced under ``prefix``; calls ``reloaded`` with each stage that is back.

    A stage that cannot be kept alive ends the server: see :class:`RestartBudget`.
    """

    def __init__(
        self,
        prefix: str,
        repository: Repository,
        reloaded: Callable[[str], None],
        directory: Path = SHM_DIRECTORY,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._prefix, self._repository, self._directory, self._clock = prefix, repository, directory, clock
        self._reloaded = reloaded
        self._histories: dict[str, _History] = {}

    async def run(self) -> None:
        """Watch until cancelled.

        Raises:
            CommandError: a stage cannot be kept alive.
            RestartNeeded: a stage cannot be replaced alone.
        """
        while True:
            await self.check()
            await asyncio.sleep(WATCH_S)

    async def check(self) -> None:
        """Reload, one after the other, every stage that has lost a process and is due for a try.

        Raises:
            CommandError: a stage cannot be kept alive.
            RestartNeeded: a stage cannot be replaced alone.
        """
        for stage, dead in liveness.dead_stages(self._prefix, self._directory).items():
            history = self._histories.setdefault(stage, _History())
            if self._clock() >= history.next_try_at:
                await self._reload(stage, ", ".join(str(process.pid) for process in dead), history)

    async def _reload(self, stage: str, pids: str, history: _History) -> None:
        started = self._clock()
        if not history.tries.again(started):
            raise CommandError(f"stage {stage} (process {pids}) died and {MAX_TRIES} reloads did not keep it alive")
        log_event(f"stage {stage} died (process {pids}); reloading")
        before = liveness.processes(self._prefix, stage, self._directory)
        try:
            await self._repository.reload(stage)
        except TimeoutError as error:
            raise RestartNeeded(f"{stage} died (process {pids}), and Triton hangs") from error
        except ReloadError as error:
            # Memory that it lacks may still be in use by a process that is ending.
            history.next_try_at = self._clock() + 2.0 ** (history.tries.count - 1)
            log_event(f"stage {stage} could not be reloaded: {error}")
            return
        for process in before:
            if process.alive:
                # Triton waits for ever for a request that the dead process lost, and keeps the stage's
                # other process running. Its lock proves that the process id is still its own.
                os.kill(process.pid, signal.SIGKILL)
            process.remove()
        history.reloads += 1
        self._reloaded(stage)
        history.tries.back(now := self._clock())
        log_event(f"stage {stage} is back after {now - started:.1f} s (reload {history.reloads})")


class ModelRepository:
    """The models of the Triton at ``http_port`` of this host, reloaded by its HTTP API."""

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
        """Give ``model`` new processes, and wait until it is ready.

        Models that build on it stay loaded, or are loaded again with it as ensembles are.

        Raises:
            ReloadError: it is not ready afterwards.
            TimeoutError: Triton did not answer in time.
        """
        try:
            await self._post(f"/v2/repository/models/{model}/unload", UNLOAD_TIMEOUT_S)
            # Unready is enough: a model whose dead process lost a request is never unloaded, and a new one can be
            # loaded beside it all the same.
            deadline = time.monotonic() + UNLOAD_TIMEOUT_S
            while await self._ready(model):
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{model} was not unloaded within {UNLOAD_TIMEOUT_S:g} s")
                await asyncio.sleep(RELOAD_S)
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
