"""A measurement's result, and whether it reaches its goal."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Literal

import msgspec


class Figure(msgspec.Struct, frozen=True):
    """One number of one bench; medians of the trials unless its name says otherwise.

    ``goal`` is the number to reach, from above or below as ``better`` says; None where there is none.
    ``trials`` are the numbers that ``value`` is the median of.
    """

    bench: str
    name: str
    value: float
    unit: str
    goal: float | None = None
    better: Literal["lower", "higher"] | None = None
    trials: tuple[float, ...] = ()

    @property
    def met(self) -> bool | None:
        """Whether the goal is reached."""
        if self.goal is None:
            return None
        return self.value <= self.goal if self.better == "lower" else self.value >= self.goal


def median(
    bench: str,
    name: str,
    trials: Sequence[float],
    unit: str,
    goal: float | None = None,
    better: Literal["lower", "higher"] | None = None,
) -> Figure:
    """The figure that is the median of ``trials``."""
    return Figure(bench, name, statistics.median(trials), unit, goal, better, tuple(trials))


def repeated(count: int, trial: Callable[[], float]) -> list[float]:
    """The results of ``count`` calls of ``trial``, after one uncounted warm-up call."""
    trial()
    return [trial() for _ in range(count)]


def table(figures: Sequence[Figure]) -> str:
    """``figures`` for a person, a row each."""
    rows = [("bench", "figure", "value", "unit", "goal", "")]
    for figure in figures:
        sign = {"lower": "<=", "higher": ">=", None: ""}[figure.better]
        goal = "" if figure.goal is None else f"{sign} {figure.goal:g}"
        verdict = {True: "met", False: "MISSED", None: ""}[figure.met]
        rows.append((figure.bench, figure.name, f"{figure.value:.4g}", figure.unit, goal, verdict))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    right = {2, 4}
    lines = (
        "  ".join(cell.rjust(width) if at in right else cell.ljust(width) for at, (cell, width) in enumerate(pairs))
        for pairs in (list(zip(row, widths, strict=True)) for row in rows)
    )
    return "\n".join(line.rstrip() for line in lines)
