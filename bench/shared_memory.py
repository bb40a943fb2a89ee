"""``kv_handoff`` and ``weight_sharing`` as benches; each is also a program of its own with more to choose."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from bench import kv_handoff, weight_sharing
from bench.figure import Figure
from bench.setting import Setting

GOAL_COPIES = 1.25


def run_kv_handoff(setting: Setting, megabytes: Sequence[int] = kv_handoff.SIZES) -> list[Figure]:
    """Milliseconds to hand a context over with each connector there is; ``shm`` has a goal."""
    figures = []
    for row in kv_handoff.run(megabytes=megabytes):
        if isinstance(row, kv_handoff.Unavailable):
            print(kv_handoff.line(row), file=sys.stderr)
            continue
        goal = kv_handoff.GOAL_RATIO * row.copy_ms + kv_handoff.GOAL_MS if row.connector == "shm" else None
        name = f"{row.connector}, {row.megabytes} MB, {row.blocks}"
        figures.append(Figure("kv_handoff", name, row.handoff_ms, "ms", goal, None if goal is None else "lower"))
        figures.append(Figure("kv_handoff", f"a copy beside {name}", row.copy_ms, "ms"))
    return figures


def run_weight_sharing(setting: Setting) -> list[Figure]:
    """Copies of the weights in memory with a process per stage, in each dtype."""
    figures = []
    for dtype, sharing in weight_sharing.run(setting.device):
        figures.append(Figure("weight_sharing", f"weights in {dtype}", sharing.weight_bytes / 2**20, "MiB"))
        figures.append(Figure("weight_sharing", f"{dtype}, in memory", sharing.copies, "times", GOAL_COPIES, "lower"))
    return figures
