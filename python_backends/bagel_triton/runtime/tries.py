"""How often something that dies is brought back before it is given up."""

from __future__ import annotations

MAX_TRIES, STABLE_S = 5, 10.0


class Tries:
    """The tries since it last lived for :data:`STABLE_S` seconds; all times are in seconds of one clock.

    What does not get there in :data:`MAX_TRIES` tries will not recover: then the server had
    better end than look alive.
    """

    def __init__(self) -> None:
        self.count = 0
        self._back_at: float | None = None  # None while it is dead

    def again(self, now: float) -> bool:
        """It died, or could not be brought back: whether to try again."""
        if self._back_at is not None and now - self._back_at >= STABLE_S:
            self.count = 0
        self._back_at = None
        if self.count == MAX_TRIES:
            return False
        self.count += 1
        return True

    def back(self, now: float) -> None:
        """It lives."""
        self._back_at = now
