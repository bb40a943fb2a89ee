"""A server of stage 1 as an operator or its own supervisor sees it: its load, and taking it out of service."""

from __future__ import annotations

import time
from collections.abc import Sequence

from bagel_triton.deploy.topology import DECODER, DIT
from bagel_triton.protocol.errors import Internal
from bagel_triton.protocol.intervals import WATCH_S
from bagel_triton.triton.client import READY_S, TritonServer
from bagel_triton.triton.tickets import Drain, StageStatus, Status, exchange

IDLE_S = 1.0  # between the end of a request's denoising and the call that has it decoded


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
