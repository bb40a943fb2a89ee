"""Stage processes of a running server, to be killed, and a load to do it under."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tests.support.serving import Server

SHARED_MEMORY = Path("/dev/shm")


def descendants(pid: int) -> list[int]:
    """Process ids below ``pid``."""
    direct: list[int] = []
    with contextlib.suppress(OSError):  # a process that has just ended
        for path in list(Path(f"/proc/{pid}/task").glob("*/children")):
            with contextlib.suppress(OSError):  # a thread that has
                direct += map(int, path.read_text().split())
    return direct + [grandchild for child in direct for grandchild in descendants(child)]


def stage_pids(server: Server, stage: str) -> list[int]:
    """The living processes of a stage, as the kernel lists them."""
    return [pid for pid in descendants(server.process.pid) if f"/{stage}/1/model.py" in arguments(pid)]


def arguments(pid: int) -> str:
    """The command line of a process; empty where it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()  # empty for a zombie
    except OSError:
        return ""


def kill(server: Server, stage: str) -> int:
    """SIGKILL one process of ``stage``; its id."""
    pid = stage_pids(server, stage)[0]
    os.kill(pid, signal.SIGKILL)
    return pid


def shared_files(server: Server) -> Counter[str]:
    """How many files of each kind the server has in shared memory."""
    names = [path.name for path in SHARED_MEMORY.glob(f"bagel_triton_{server.process.pid}_*")]
    kinds = [re.sub(r"bagel_triton_\d+_[0-9a-f]{8}", "", name) for name in names]
    return Counter(re.sub(r"\d{10,}|[0-9a-f-]{36}|\.[0-9a-f]{8}$", "*", kind) for kind in kinds)


def health(server: Server) -> int:
    """Status of the proxy's ``/health``."""
    return httpx.get(f"{server.url}/health", trust_env=False, timeout=30).status_code


def until(condition: Callable[[], bool], what: str, seconds: float) -> float:
    """Wait for ``condition``; how long it took."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < seconds, f"{what}: not within {seconds:g} s"
        time.sleep(0.03)
    return time.monotonic() - started


@dataclass(frozen=True)
class Ended:
    """How a request ended: its status, its body, and when (``time.monotonic()``)."""

    status: int
    reply: dict[str, Any]
    at: float


class Load:
    """Clients that each send one body, at once; iterate for how all of them ended."""

    def __init__(self, server: Server, bodies: Sequence[dict[str, Any]], timeout_s: float) -> None:
        self._server, self._timeout_s = server, timeout_s
        self._ended: list[Ended | Exception] = []
        self._threads = [threading.Thread(target=self._ask, args=(body,), daemon=True) for body in bodies]
        for thread in self._threads:
            thread.start()

    def _ask(self, body: dict[str, Any]) -> None:
        try:
            url = f"{self._server.url}/v1/chat/completions"
            response = httpx.post(url, json=body, timeout=self._timeout_s, trust_env=False)
            self._ended.append(Ended(response.status_code, response.json(), time.monotonic()))
        except Exception as error:  # a hanging request is one: the test must see it
            self._ended.append(error)

    def __iter__(self) -> Iterator[Ended]:
        for thread in self._threads:
            thread.join()
        for ended in self._ended:
            if isinstance(ended, Exception):
                raise AssertionError("a request did not end") from ended
            yield ended
