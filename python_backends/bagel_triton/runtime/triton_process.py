"""The tritonserver process: its start, its readiness, its end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

import httpx

from bagel_triton.runtime import child, triton_log
from bagel_triton.runtime.ports import LOOPBACK
from bagel_triton.runtime.tritonserver import EXIT_TIMEOUT_S
from bagel_triton.runtime.wait import Wait

STOP_TIMEOUT_S = EXIT_TIMEOUT_S + 4.0  # its own timeout, and time to unload the models
POLL_S = 0.1
REAP_S = 0.02
CRASHES = (-signal.SIGABRT, -signal.SIGSEGV, -signal.SIGBUS)


class TritonProcess:
    """A tritonserver and its stubs, in a process group that ends with this process."""

    def __init__(self, process: asyncio.subprocess.Process, models: Sequence[str], http_port: int, log: Path) -> None:
        self._process = process
        self._models = models
        self._url = f"http://{LOOPBACK}:{http_port}"
        self._log = log
        self.loaded = asyncio.Event()  # every model was ready once

    @classmethod
    async def start(
        cls,
        command: Sequence[str],
        environment: Mapping[str, str],
        *,
        models: Sequence[str],
        http_port: int,
        log: Path,
    ) -> Self:
        """Start ``command``, which serves ``models``; its output is added to the file ``log``."""
        child.adopt_orphans()  # stubs outlive their server for a moment
        argv = child.command(list(command))
        with log.open("ab") as output:
            process = await asyncio.create_subprocess_exec(
                *argv,
                env=environment,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        return cls(process, models, http_port, log)

    async def ended(self) -> str:
        """Wait for the process to end by itself; why it did, in one line."""
        status = await self._process.wait()
        reason = triton_log.failure(self._log)
        how = f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
        return f"tritonserver ended ({how}){f': {reason}' if reason else ''}; its log: {self._log}"

    @property
    def crashed(self) -> bool:
        """Whether it ended by a fault of its own, after it had served."""
        return self.loaded.is_set() and self._process.returncode in CRASHES

    async def until_ready(self) -> None:
        """Wait for every model to be ready, telling now and then which are not."""
        wait, waiting = Wait(), list(self._models)
        async with httpx.AsyncClient(base_url=self._url, trust_env=False) as client:
            while waiting:
                # It does not listen before it has tried to load every model.
                with contextlib.suppress(httpx.TransportError):
                    waiting = [model for model in waiting if not await _is_ready(client, model)]
                if waiting and wait.due:
                    loaded = triton_log.loaded_models(self._log)
                    wait.tell(", ".join(model for model in waiting if model not in loaded) or "the server itself")
                await asyncio.sleep(POLL_S)
        self.loaded.set()

    async def stop(self, at_once: bool = False) -> None:
        """End the process and its stubs, within :data:`STOP_TIMEOUT_S` seconds or ``at_once``."""
        # While it loads models it does not heed a polite signal.
        if not at_once and self._process.returncode is None and self.loaded.is_set():
            self._process.terminate()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), STOP_TIMEOUT_S)
        with contextlib.suppress(ProcessLookupError):  # the group is empty
            os.killpg(self._process.pid, signal.SIGKILL)
        await self._process.wait()
        with contextlib.suppress(ChildProcessError):  # none is left
            while True:
                os.waitpid(-self._process.pid, os.WNOHANG)
                await asyncio.sleep(REAP_S)


async def _is_ready(client: httpx.AsyncClient, model: str) -> bool:
    return (await client.get(f"/v2/models/{model}/ready")).is_success
