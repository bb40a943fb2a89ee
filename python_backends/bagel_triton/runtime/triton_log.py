"""What tritonserver's log says of its models."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import TextIO

FOLLOW_S = 0.2

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
