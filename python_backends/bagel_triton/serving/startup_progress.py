"""A start that takes its time says what it waits for."""

from __future__ import annotations

import time

TELL_EVERY_S = 10.0


class StartupProgress:
    """One wait, of which a person hears every :data:`TELL_EVERY_S` seconds."""

    def __init__(self) -> None:
        self._began = self._told = time.monotonic()

    @property
    def due(self) -> bool:
        """Whether it is time to tell again."""
        return time.monotonic() - self._told > TELL_EVERY_S

    def tell(self, missing: str) -> None:
        """Print what is still ``missing``, and since when."""
        self._told = time.monotonic()
        print(f"  waiting for {missing} ({self._told - self._began:.0f} s)", flush=True)
