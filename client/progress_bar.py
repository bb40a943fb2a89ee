"""A bar of the steps that are done, where somebody looks at it."""

from __future__ import annotations

import sys
from typing import Any, TextIO

from tqdm import tqdm


class ProgressBar:
    """On standard error from the first progress on, if that is a terminal: a file is no place for it."""

    def __init__(self, unit: str = "step") -> None:
        self._unit = unit
        self._bar: tqdm[Any] | None = None

    def show(self, name: str, done: int, total: int) -> None:
        if self._bar is None:
            hidden = True if sys.stderr is None else None  # None: only on a terminal
            self._bar = tqdm(desc=name, total=total, unit=self._unit, leave=False, disable=hidden)
        self._bar.total, self._bar.n = total, done
        self._bar.set_description(name)

    def write(self, text: str, file: TextIO | None = None) -> None:
        """Print ``text`` above it, on standard output unless a ``file`` is named."""
        tqdm.write(text, file=file)

    def close(self) -> None:
        """Take it away until there is progress again."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
