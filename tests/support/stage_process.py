"""Processes that announce themselves as stages, for tests to kill."""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path
from typing import Self

import pytest

from bagel_triton.ipc import liveness

PREFIX = "test_1"


class AnnouncedProcess:
    """One process of ``stage``, announced in ``directory``."""

    def __init__(self, directory: Path, stage: str) -> None:
        command = [sys.executable, str(Path(__file__).with_name("announced.py")), str(directory), PREFIX, stage]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._expect("announced")

    def _expect(self, line: str) -> None:
        assert self._process.stdout is not None
        assert self._process.stdout.readline().strip() == line

    @property
    def pid(self) -> int:
        return self._process.pid

    def kill(self) -> None:
        """End it as ``kill -9`` does; it stays a zombie until the block ends."""
        self._process.kill()

    def withdraw(self) -> None:
        """Let it withdraw, and go on living."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        self._expect("withdrawn")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.communicate()


def announced_in(directory: Path, patch: pytest.MonkeyPatch) -> Path:
    """Make ``liveness`` look for processes in ``directory``."""
    for function in (liveness.watch, liveness.dead_stages):
        patch.setattr(liveness, function.__name__, functools.partial(function, directory=directory))
    return directory
