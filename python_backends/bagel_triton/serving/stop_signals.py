"""The signals that end a server: at once while it starts, in good order from then on."""

from __future__ import annotations

import asyncio
import signal
from types import FrameType, TracebackType
from typing import Any, Self

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Stopped(BaseException):
    """A signal came while the server was starting; nothing that waits or imports may hold it up."""


class StopSignals:
    """Within it the first signal raises :class:`Stopped`, wherever the program is, and more of them are ignored."""

    def __init__(self) -> None:
        self._came = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._stop)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def awaited(self) -> asyncio.Event:
        """From now on, and in the running event loop, a signal only sets this event."""
        event = asyncio.Event()
        for number in SIGNALS:
            asyncio.get_running_loop().add_signal_handler(number, event.set)
        if self._came:  # and what it raised was lost, as in a callback of the interpreter's own
            event.set()
        return event

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._came = True
        for other in SIGNALS:  # the end itself is not to be cut off
            signal.signal(other, signal.SIG_IGN)
        raise Stopped
