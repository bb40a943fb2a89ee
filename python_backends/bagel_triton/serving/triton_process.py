"""The tritonserver process: its start, its readiness, its end, and its log."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self, TextIO

import httpx

from bagel_triton.protocol.intervals import FOLLOW_S, REAP_S, START_S
from bagel_triton.serving.machine import LOOPBACK
from bagel_triton.serving.process import adopt_orphans, guarded
from bagel_triton.serving.tritonserver import EXIT_TIMEOUT_S

STOP_TIMEOUT_S = EXIT_TIMEOUT_S + 4.0  # its own timeout, and time to unload the models
CRASHES = (-signal.SIGABRT, -signal.SIGSEGV, -signal.SIGBUS)
REPORT_EVERY_S = 10.0


class StartupProgress:
    """Reports what a start waits for, every :data:`REPORT_EVERY_S` seconds."""

    def __init__(self) -> None:
        self._began = self._reported = time.monotonic()

    @property
    def due(self) -> bool:
        """Whether it is time for another report."""
        return time.monotonic() - self._reported > REPORT_EVERY_S

    def report(self, missing: str) -> None:
        """Print what is still ``missing``, and since when."""
        self._reported = time.monotonic()
        print(f"  waiting for {missing} ({self._reported - self._began:.0f} s)", flush=True)


class TritonProcess:
    """A tritonserver and its stubs, in a process group that ends with this process."""

    def __init__(self, process: asyncio.subprocess.Process, models: Sequence[str], http_port: int, log: Path) -> None:
        self._process = process
        self._models = models
        self._url = f"http://{LOOPBACK}:{http_port}"
        self._log = log
        self._scratch = Scratch()
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
        adopt_orphans()  # stubs outlive their server for a moment
        with log.open("ab") as output:
            process = await asyncio.create_subprocess_exec(
                *guarded(list(command)),
                env=environment,
                stdin=asyncio.subprocess.PIPE,  # closed when this process ends
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        return cls(process, models, http_port, log)

    async def ended(self) -> str:
        """Wait for the process to end by itself; why it did, in one line."""
        status = await self._process.wait()
        reason = failure(self._log)
        how = f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
        return f"tritonserver ended ({how}){f': {reason}' if reason else ''}; its log: {self._log}"

    @property
    def crashed(self) -> bool:
        """Whether it ended by a fault of its own, after it had served."""
        return self.loaded.is_set() and self._process.returncode in CRASHES

    async def until_ready(self) -> None:
        """Wait for every model to be ready; prints now and then which are not."""
        progress, waiting = StartupProgress(), list(self._models)
        async with httpx.AsyncClient(base_url=self._url, trust_env=False) as client:
            while waiting:
                # It does not listen before it has tried to load every model.
                with contextlib.suppress(httpx.TransportError):
                    waiting = [model for model in waiting if not await _is_ready(client, model)]
                if waiting and progress.due:
                    loaded = loaded_models(self._log)
                    missing = [model for model in waiting if model not in loaded]
                    progress.report(", ".join(missing) or "the server itself")
                await asyncio.sleep(START_S)
        self._scratch.claim()
        self.loaded.set()

    async def stop(self, at_once: bool = False) -> None:
        """End the process and its stubs, within :data:`STOP_TIMEOUT_S` seconds or ``at_once``."""
        # While it loads models it ignores SIGTERM.
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
        self._scratch.remove()


async def _is_ready(client: httpx.AsyncClient, model: str) -> bool:
    return (await client.get(f"/v2/models/{model}/ready")).is_success


class Scratch:
    """The folder that Triton's Python backend makes under /tmp and often leaves there, empty.

    Its name is fixed in the backend but for a random end, and no variable moves it. So those that appear while a
    server starts are taken for its own. Removing a folder of a server that starts at the same time does no harm:
    only one that unpacks an environment of its own uses the folder, and then it is not empty.
    """

    def __init__(self, directory: Path = Path("/tmp")) -> None:
        self._directory = directory
        self._before = self._present()
        self._own: set[Path] = set()

    def claim(self) -> None:
        """Those that appeared since the start are this server's."""
        self._own = self._present() - self._before

    def remove(self) -> None:
        """Remove them, where they are empty."""
        for path in self._own or self._present() - self._before:
            with contextlib.suppress(OSError):
                path.rmdir()

    def _present(self) -> set[Path]:
        return set(self._directory.glob("python_env_??????"))


_LOADED = re.compile(r"\] \"successfully loaded '([^']+)'\"")
_FAILED = re.compile(r"^E.*?\] \"?((?:failed to load|failed to poll|Poll failed).*?)\"?$", re.MULTILINE)
_LAST_WORDS = re.compile(r"^(?:error: |.*error while loading shared libraries: ).*$", re.MULTILINE)


def loaded_models(log: Path) -> set[str]:
    """Names of the models whose loading the log reports."""
    return set(_LOADED.findall(_read(log)))


def failure(log: Path) -> str | None:
    """Why tritonserver gave up, in one line; None where the log does not say."""
    text = _read(log)
    if failed := _FAILED.search(text):
        return _one_line(_unescape(failed[1]))
    if last_words := _LAST_WORDS.findall(text):
        return _one_line(last_words[-1].removeprefix("error: ").removeprefix("creating server: "))
    return None


async def follow(log: Path, out: TextIO) -> None:
    """Copy ``log`` to ``out`` as it grows, until cancelled."""
    with log.open(errors="replace") as lines:
        try:
            while True:
                out.write(lines.read())
                out.flush()
                await asyncio.sleep(FOLLOW_S)
        finally:
            out.write(lines.read())
            out.flush()


def _read(log: Path) -> str:
    return log.read_text(errors="replace")


def _unescape(message: str) -> str:
    """``message`` as it was before the log made one line of it."""
    return message.replace(r"\n", "\n").replace(r"\"", '"')


def _one_line(message: str) -> str:
    """``message`` without the stack that the Python backend appends."""
    return " ".join(message.partition("\n\nAt:\n")[0].split())
