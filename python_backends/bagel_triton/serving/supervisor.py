"""The supervisor: tritonserver as a child, the proxy in this process, both stopped together."""

from __future__ import annotations

import asyncio
import contextlib
import math
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from bagel_triton.protocol.intervals import RETEST_S, START_S, WATCH_S
from bagel_triton.serving import CommandError
from bagel_triton.serving.drain import set_draining, until_idle
from bagel_triton.serving.process import log_event
from bagel_triton.serving.tritonserver import STOP_TIMEOUT_S, StartupProgress, TritonProcess, follow
from bagel_triton.serving.watchdog import ModelRepository, RestartBudget, RestartNeeded, Watchdog
from bagel_triton.triton.client import TritonServer

SELFTEST, SELFTEST_S = "selftest", 60.0
LAST_S = 1  # for their last responses, before Triton ends


class StageServers:
    """The servers of stage 1: those that are ``known``, by the configuration or as they register, and those taken in.

    One is taken in, so that requests go there, once it has read the thinker's KV.
    """

    def __init__(self, known: Callable[[], Sequence[str]] = tuple) -> None:
        self.known, self.taken = known, list[str]()

    def addresses(self) -> Sequence[str]:
        """Those that are taken in; before the first one is, all."""
        return self.taken or self.known()


@dataclass
class Launch:
    """Everything that one server is started with.

    ``proxy`` is None and ``listeners`` is empty for a headless server. ``url`` is where the server
    is reached, and ``grpc`` where its own ``models`` are. ``remote`` models are at each of ``servers``.
    ``ready_by`` is the end of a start, on the monotonic clock. Requests in flight at a shutdown get
    ``shutdown_timeout_s`` seconds.
    """

    command: list[str]
    environment: dict[str, str]
    models: tuple[str, ...]
    http_port: int
    log: Path
    proxy: Starlette | None
    listeners: list[socket.socket]
    url: str
    grpc: str
    remote: tuple[str, ...]
    servers: StageServers
    ready_by: float
    shutdown_timeout_s: float
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
        self._server = None if launch.proxy is None else _Uvicorn(_uvicorn_config(launch))

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


def _uvicorn_config(launch: Launch) -> uvicorn.Config:
    assert launch.proxy is not None, "it is not headless"
    timeout_s = math.ceil(launch.shutdown_timeout_s) + LAST_S + int(STOP_TIMEOUT_S) + 1
    return http_server.config(launch.proxy, launch.proxy.state.http, timeout_s)


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
    ready = asyncio.create_task(_until_ready(triton, launch, control))
    watching = asyncio.create_task(_watch(triton, launch, control))
    helpers: list[asyncio.Task[None]] = []
    crash = None
    try:
        ends = {serving, ended, stopped, watching}
        done, _ = await asyncio.wait({*ends, ready}, return_when=asyncio.FIRST_COMPLETED)
        if done == {ready}:
            ready.result()
            launch.ready_by = math.inf  # a restart has no limit of its own
            budget.back(time.monotonic())
            print(f"READY {launch.url}", flush=True)
            if launch.remote:
                helpers.append(asyncio.create_task(_follow_servers(launch, control)))
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
            await _finish_requests(launch, serving, triton)
            control.stop()
            await asyncio.wait({serving}, timeout=LAST_S)
        await triton.stop(at_once=crash is not None)
        for task in (ended, ready, watching, *helpers):
            task.cancel()
        await asyncio.wait({ended, ready, watching, *helpers})
    return crash


async def _finish_requests(launch: Launch, serving: asyncio.Task[None], triton: TritonProcess) -> None:
    """Let requests in flight end; a server of stage 1 takes no more of them meanwhile."""
    if launch.proxy is not None:
        await asyncio.wait({serving}, timeout=launch.shutdown_timeout_s)
    elif triton.loaded.is_set():
        server = TritonServer(launch.grpc)
        try:
            await asyncio.to_thread(set_draining, server, True)
            left = await asyncio.to_thread(until_idle, server, launch.shutdown_timeout_s)
            log_event(f"{left} jobs are left after {launch.shutdown_timeout_s:g} s" if left else "all jobs have ended")
        except BagelError as error:  # it has ended, or hangs
            log_event(f"jobs in flight are not waited for: {error.message}")
        finally:
            server.close()


async def _follow_servers(launch: Launch, control: ControlFile) -> None:
    """Have the orchestrators call each server of stage 1 that joins, once it has read the thinker's KV."""
    failed_at: dict[str, float] = {}
    while True:
        known, before = launch.servers.known(), launch.servers.taken
        taken = [address for address in known if address in before]
        for address in known:
            if address in taken or time.monotonic() - failed_at.get(address, -math.inf) < RETEST_S:
                continue
            try:
                connector = await check_connector({THINKER: launch.grpc, DIT: address})
            except StageUnavailable as error:
                if address not in failed_at:
                    log_event(f"stage 1 at {address} is not taken in yet: {error.message}")
                failed_at[address] = time.monotonic()
                continue
            failed_at.pop(address, None)
            taken.append(address)
            log_event(f"stage 1 at {address} is in: {connector} carried a pattern from {THINKER} to {DIT}")
        for address in set(before) - set(taken):
            log_event(f"stage 1 at {address} is forgotten: it is registered no longer")
        if taken != before:
            launch.servers.taken = taken
            control.set_replicas(taken)
        await asyncio.sleep(WATCH_S)


async def _test_connector(launch: Launch, control: ControlFile) -> str:
    """The connector that carried a pattern to the DiT; of several servers, the first one that reads it is taken in.

    Raises:
        StageUnavailable: none does, with the last one's reason.
    """
    if not launch.remote:
        return await check_connector({THINKER: launch.grpc, DIT: launch.grpc})
    failure = StageUnavailable("no server of stage 1 is registered any more")
    for address in launch.servers.known():
        try:
            connector = await check_connector({THINKER: launch.grpc, DIT: address})
        except StageUnavailable as error:
            failure = error
            continue
        launch.servers.taken = [address]
        control.set_replicas([address])
        return connector
    raise failure


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


async def _until_ready(triton: TritonProcess, launch: Launch, control: ControlFile) -> None:
    progress = StartupProgress()
    limit_s = None if launch.ready_by == math.inf else max(0.0, launch.ready_by - time.monotonic())
    try:
        async with asyncio.timeout(limit_s):
            await triton.until_ready(progress)
            if launch.proxy is not None:
                await _until_healthy(launch, progress)
            if {THINKER, DIT} <= {*launch.models, *launch.remote}:
                connector = await _test_connector(launch, control)
                print(f"  self-test: {connector} carried a pattern from {THINKER} to {DIT}", flush=True)
    except TimeoutError:
        raise CommandError(f"--init-timeout has passed: still waiting for {progress.missing}") from None
    except StageUnavailable as error:
        raise CommandError(error.message) from error


async def _until_healthy(launch: Launch, progress: StartupProgress) -> None:
    """Wait until the HTTP API finds every model ready, those of other hosts included; report which are not.

    It lags behind Triton where an early request to Triton failed and its connection waits to be tried again.
    """
    assert launch.proxy is not None
    # Not over the network: the API may have a certificate for another name.
    transport = httpx.ASGITransport(launch.proxy)
    async with httpx.AsyncClient(base_url=launch.url, transport=transport, timeout=None) as client:
        while not (answer := await client.get("/health")).is_success:
            away = [model for model, ready in answer.json()["models"].items() if not ready]
            remote = " and ".join(launch.servers.addresses())
            places = [f"{model} at {remote if model in launch.remote else launch.grpc}" for model in away]
            progress.note(", ".join(places))
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
