"""``bagel-triton drain``: take one server out of service without losing a request, or put it back.

A server that clients call refuses their new requests at its orchestrator. One of stage 1 refuses the jobs of stage 0,
which gives them to another.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import time
from collections.abc import Sequence

from bagel_triton.deploy.topology import DECODER, DIT, ORCHESTRATOR
from bagel_triton.openai.settings import ProxySettings
from bagel_triton.protocol.errors import BagelError, Internal
from bagel_triton.protocol.intervals import WATCH_S
from bagel_triton.protocol.sleep import SleepCall
from bagel_triton.serving import CommandError, flags
from bagel_triton.triton.client import READY_S, TritonClient, TritonServer
from bagel_triton.triton.tickets import Drain, StageStatus, Status, exchange

IDLE_S = 1.0  # between the end of a request's denoising and the call that has it decoded


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("address", metavar="HOST:PORT", help="its Triton gRPC, as `serve` prints it")
    parser.add_argument(
        "--timeout", type=float, default=600.0, metavar="S", help="for what is in flight (default: %(default)s)"
    )
    parser.add_argument("--resume", action="store_true", help="take requests again")


def run(args: argparse.Namespace) -> int:
    """Have the server refuse new requests, and wait for those that it has.

    Raises:
        CommandError: it does not answer, or work is left after the timeout.
    """
    if not 0 <= args.timeout < math.inf:
        raise CommandError(f"--timeout={args.timeout:g} is not allowed; allowed: seconds >= 0")
    address = flags.host_port("HOST:PORT", args.address)
    server = TritonServer(address)
    try:
        if server.is_ready(ORCHESTRATOR):
            return asyncio.run(_drain_orchestrator(address, args.timeout, args.resume))
        set_draining(server, not args.resume)
        if args.resume:
            print(f"{address} takes requests again")
            return 0
        print(f"{address} takes no more requests", flush=True)
        if left := until_idle(server, args.timeout):
            raise CommandError(f"{left} jobs are left at {address} after {args.timeout:g} s; it still drains")
        print(f"{address} is idle")
    except BagelError as error:
        raise CommandError(f"{address}: {error.message}") from error
    finally:
        server.close()
    return 0


async def _drain_orchestrator(address: str, timeout_s: float, resume: bool) -> int:
    """Have the server that clients call refuse new requests, and wait for those that it has; or take them again."""
    client, ends = TritonClient(ProxySettings(address, (ORCHESTRATOR,))), time.monotonic() + timeout_s
    try:
        state = await client.sleep(SleepCall("resume" if resume else "drain"))
        if resume:
            print(f"{address} takes requests again")
            return 0
        print(f"{address} takes no more requests", flush=True)
        while state.state != "drained":
            if time.monotonic() > ends:
                raise CommandError(f"requests are left at {address} after {timeout_s:g} s; it still drains")
            await asyncio.sleep(WATCH_S)
            state = await client.sleep(SleepCall("state"))
        print(f"{address} is idle")
        return 0
    finally:
        await client.close()


def stage_status(server: TritonServer, model: str, timeout_s: float = READY_S) -> StageStatus:
    """The load of ``model``.

    Raises:
        BagelError: it does not answer, or is no stage.
    """
    answer, _ = exchange(server.model_call(model, timeout_s), Status())
    if answer.status is None:
        raise Internal(f"{model} answered without its status")
    return answer.status


def set_draining(server: TritonServer, on: bool) -> None:
    """Have the DiT refuse new jobs, or take them again.

    Raises:
        BagelError: it does not answer.
    """
    exchange(server.model_call(DIT, READY_S), Drain(on))


def until_idle(server: TritonServer, timeout_s: float, models: Sequence[str] = (DIT, DECODER)) -> int:
    """Wait until stage 1 has no work left, but no longer than ``timeout_s``; the jobs that are left.

    Raises:
        BagelError: it does not answer.
    """
    ends = time.monotonic() + timeout_s
    idle_since = None
    while True:
        jobs, now = sum(stage_status(server, model).jobs for model in models), time.monotonic()
        idle_since = None if jobs else (idle_since or now)
        if idle_since is not None and now - idle_since >= IDLE_S:
            return 0
        if now > ends:
            return jobs
        time.sleep(WATCH_S)
