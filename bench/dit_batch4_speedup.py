"""``dit_batch4_speedup``: four requests denoised together against the same ones one after another."""

from __future__ import annotations

import time
from collections.abc import Sequence

from bagel_triton.pipeline.local import LocalStages
from bench.figure import Figure, median
from bench.setting import Setting, denoise_job, image_request

NAME = "dit_batch4_speedup"
Sizes = Sequence[tuple[int, int]]
MIXED: Sizes = ((256, 256), (512, 512), (384, 512), (256, 384))
SMALL: Sizes = ((64, 64),) * 4
MIXED_STEPS, SMALL_STEPS = 5, 20


def run(setting: Setting, mixed: Sizes = MIXED) -> list[Figure]:
    """Speedup of four requests together: mixed sizes, and small ones."""
    with setting.stages() as stages:
        both = [
            ("mixed, 256 to 512", _speedups(stages, mixed, MIXED_STEPS, setting.trials), 1.0),
            ("4 x 64x64", _speedups(stages, SMALL, SMALL_STEPS, setting.trials), 2.0),
        ]
    return [median(NAME, name, speedups, "x", goal, "higher") for name, speedups, goal in both]


def _speedups(stages: LocalStages, sizes: Sizes, steps: int, trials: int) -> list[float]:
    speedups = []
    for _ in range(1 + trials):
        apart = sum(_seconds(stages, [size], steps) for size in sizes)
        speedups.append(apart / _seconds(stages, sizes, steps))
    return speedups[1:]


def _seconds(stages: LocalStages, sizes: Sizes, steps: int) -> float:
    """From handing the requests to the DiT, contexts ready, until the last is done."""
    jobs = [denoise_job(stages, image_request(*size, steps, seed)) for seed, size in enumerate(sizes)]
    started = time.perf_counter()
    running = [stages.dit.submit(job, job.request_id, lambda event: None) for job in jobs]
    for job in running:
        job.done.result()
    return time.perf_counter() - started
