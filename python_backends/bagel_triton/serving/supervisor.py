"""The supervisor: tritonserver as a child, the proxy in this process, both stopped together."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import uvicorn
from starlette.applications import Starlette

from bagel_triton.deploy.topology import DIT, THINKER
from bagel_triton.ipc.control_file import SERVER, ControlFile
from bagel_triton.ipc.shm import SharedMemoryPrefix
from bagel_triton.openai import http_server
from bagel_triton.protocol.errors import BagelError, StageUnavailable
from bagel_triton.protocol.intervals import START_S
from bagel_triton.serving import CommandError
from bagel_triton.serving.process import log_event
from bagel_triton.serving.tritonserver import STOP_TIMEOUT_S, StartupProgress, TritonProcess, follow
from bagel_triton.serving.watchdog import ModelRepository, RestartBudget, RestartNeeded, Watchdog
from bagel_triton.triton.client import TritonServer

GRACE_S = 3  # for requests in flight at a shutdown, before they are aborted
SELFTEST, SELFTEST_S = "selftest", 60.0
LAST_S = 1  # for their last responses, before Triton ends


@dataclass(frozen=True)
class Launch:
    """Everything that one server is started with.

    ``proxy`` is None and ``listeners`` is empty for a headless server. ``url`` is where the server
    is reached; ``addresses`` are the gRPC addresses of its models, by name.
    """

    command: list[str]
    environment: dict[str, str]
    models: tuple[str, ...]
    http_port: int
    log: Path
    proxy: Starlette | None
    listeners: list[socket.socket]
    url: str
    addresses: Mapping[str, str]
    shared: SharedMemoryPrefix
    verbose: bool


class _Uvicorn(uvicorn.Server):
    """uvicorn without signal handlers: the supervisor has its own."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Proxy:
    """The HTTP API of a server; in a headless one, a task that only waits for :meth:`end`."""

    def __init__(self, launch: Launch) -> None:
        self._listeners, self._ended = launch.listeners, asyncio.Event()
        self._server = None if launch.proxy is None else _Uvicorn(_uvicorn_config(launch.proxy))

    async def serve(self) -> None:
        """Serve until :meth:`end`."""
        if self._server is None:
            await self._ended.wait()
        else:
            await self._server.serve(sockets=self._listeners)

    def end(self) -> None:
        """Accept no more requests, and stop when those in flight have ended or their time is up."""
        self._ended.set()
        if self._server is not None:
            self._server.should_exit = True


def _uvicorn_config(app: Starlette) -> uvicorn.Config:
    timeout_s = GRACE_S + LAST_S + int(STOP_TIMEOUT_S) + 1
    return http_server.config(app, app.state.http, timeout_s)


async def supervise(launch: Launch, stop: asyncio.Event) -> None:
    """Run tritonserver and the HTTP API until ``stop`` is set; neither is left when this returns or raises.

    Prints a line that starts with ``READY`` once every model is ready. A tritonserver that crashes or hangs is
    restarted: a stub that is killed while it holds a lock in their shared memory brings it down.

    Raises:
        CommandError: one of them ended by itself, a stage cannot be kept alive, or the KV connector's
            self-test failed.
    """
    proxy = _Proxy(launch)
    serving = asyncio.create_task(proxy.serve())
    stopped = asyncio.create_task(stop.wait())
    helpers: list[asyncio.Task[Any]] = [stopped]
    if launch.verbose:
        launch.log.touch()
        helpers.append(asyncio.create_task(follow(launch.log, sys.stderr)))
    budget, control = RestartBudget(), ControlFile(launch.shared.prefix)
    try:
        while crash := await _serve_once(launch, proxy, serving, stopped, budget, control):
            if not budget.again(time.monotonic()):
                raise CommandError(crash)
            log_event(f"{crash}; starting it again")
            launch.shared.clear()
            control.reloaded(SERVER)
    finally:
        proxy.end()
        await asyncio.wait({serving})
        for task in helpers:
            task.cancel()
        await asyncio.wait(helpers)


async def _serve_once(
    launch: Launch,
    proxy: _Proxy,
    serving: asyncio.Task[None],
    stopped: asyncio.Task[bool],
    budget: RestartBudget,
    control: ControlFile,
) -> str | None:
    """Run one tritonserver to its end; why another is needed, or None where the server is to stop."""
    triton = await TritonProcess.start(
        launch.command, launch.environment, models=launch.models, http_port=launch.http_port, log=launch.log
    )
    ended = asyncio.create_task(triton.ended())
    ready = asyncio.create_task(_until_ready(triton, launch))
    watching = asyncio.create_task(_watch(triton, launch, control))
    crash = None
    try:
        ends = {serving, ended, stopped, watching}
        done, _ = await asyncio.wait({*ends, ready}, return_when=asyncio.FIRST_COMPLETED)
        if done == {ready}:
            ready.result()
            budget.back(time.monotonic())
            print(f"READY {launch.url}", flush=True)
            done, _ = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        if stopped in done:
            log_event("stopping")
        elif ended in done:
            if not triton.crashed:
                raise CommandError(ended.result())
            crash = ended.result()
        elif watching in done:
            crash = _restart_reason(watching)
        else:
            serving.result()
            raise CommandError("the proxy ended by itself")
    finally:
        watching.cancel()  # stages that stop from here on did not die
        if crash is None:
            proxy.end()
            await asyncio.wait({serving}, timeout=GRACE_S)
            control.stop()
            await asyncio.wait({serving}, timeout=LAST_S)
        await triton.stop(at_once=crash is not None)
        for task in (ended, ready, watching):
            task.cancel()
        await asyncio.wait({ended, ready, watching})
    return crash


def _restart_reason(watching: asyncio.Task[None]) -> str:
    try:
        watching.result()
    except RestartNeeded as error:
        return str(error)
    raise CommandError("the watchdog ended by itself")


async def _watch(triton: TritonProcess, launch: Launch, control: ControlFile) -> None:
    await triton.loaded.wait()
    async with ModelRepository(launch.http_port) as repository:
        await Watchdog(launch.shared.prefix, repository, control.reloaded).run()


async def _until_ready(triton: TritonProcess, launch: Launch) -> None:
    await triton.until_ready()
    if launch.proxy is not None:
        await _until_healthy(launch)
    if {THINKER, DIT} <= launch.addresses.keys():
        try:
            connector = await check_connector(launch.addresses)
        except StageUnavailable as error:
            raise CommandError(error.message) from error
        print(f"  self-test: {connector} carried a pattern from {THINKER} to {DIT}", flush=True)


async def _until_healthy(launch: Launch) -> None:
    """Wait until the HTTP API finds every model ready, those of other hosts included; report which are not.

    It lags behind Triton where an early request to Triton failed and its connection waits to be tried again.
    """
    progress = StartupProgress()
    assert launch.proxy is not None
    # Not over the network: the API may have a certificate for another name.
    transport = httpx.ASGITransport(launch.proxy)
    async with httpx.AsyncClient(base_url=launch.url, transport=transport, timeout=None) as client:
        while not (answer := await client.get("/health")).is_success:
            away = [model for model, ready in answer.json()["models"].items() if not ready]
            if progress.due:
                progress.report(", ".join(f"{model} at {launch.addresses[model]}" for model in away))
            await asyncio.sleep(START_S)


async def check_connector(addresses: Mapping[str, str]) -> str:
    """The KV connector that carried a pattern from the real thinker to the real DiT, models at gRPC ``addresses``.

    Raises:
        StageUnavailable: it did not, with the stage's reason.
    """
    lease = await _selftest(addresses[THINKER], THINKER, "lend")
    return await _selftest(addresses[DIT], DIT, lease)


async def _selftest(address: str, model: str, text: str) -> str:
    server = TritonServer(address)
    arrays = {SELFTEST: np.array([text.encode()], dtype=np.object_)}
    try:
        answer = await asyncio.to_thread(server.infer, model, arrays, [SELFTEST], "", SELFTEST_S)
    except BagelError as error:
        raise StageUnavailable(f"the KV connector's self-test failed at {model}: {error.message}") from error
    finally:
        server.close()
    if SELFTEST not in answer:
        raise StageUnavailable(f"the KV connector's self-test failed at {model}: it answered nothing")
    return bytes(answer[SELFTEST].reshape(-1)[0]).decode()
