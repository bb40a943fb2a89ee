"""``dit_step_over_floor``: the time of one guided step at 512x512 over that of its matrix arithmetic.

The floor is the arithmetic of two branches (linear layers and attention) at the rate of plain
matrix products of the model's shapes on all threads, measured before and after every trial.
Trials are short and many, as the speed of a shared machine changes within seconds.
"""

from __future__ import annotations

import statistics
import time
from itertools import pairwise

from bagel_triton.model.config import VISION_TOKENS
from bagel_triton.model.cpu.thread_pool import release_intraop_threads
from bagel_triton.pipeline.local import LocalStages
from bagel_triton.protocol.messages import DenoiseJob
from bagel_triton.weights.checkpoint import Checkpoint
from bench.arithmetic import matmul_rate, products, step_flops
from bench.figure import Figure, median
from bench.setting import Setting, denoise_job, image_request

NAME = "dit_step_over_floor"
SIDE, STEPS = 512, 5
SHORT = 3  # trials are this many times as many, and shorter
GOAL = 1.2


def run(setting: Setting, side: int = SIDE) -> list[Figure]:
    """Seconds of a step, of its floor, and their ratio."""
    config = Checkpoint(setting.checkpoint).config
    latents = (side // config.latent.stride) ** 2
    steps, floors, ratios = [], [], []
    with setting.stages() as stages:
        device, dtype = stages.dit.placement
        for trial in range(1 + SHORT * setting.trials):
            job = denoise_job(stages, image_request(side, side, STEPS, seed=trial))
            flops = step_flops(config, [(latents + VISION_TOKENS, handle.tokens) for handle in job.handles])

            def rate(rows: int = len(job.handles) * latents) -> float:
                try:
                    return matmul_rate(products(config.language), rows, device, dtype)
                finally:
                    release_intraop_threads()

            before = rate()
            step = step_seconds(stages, job)
            after = rate()
            if trial:  # the first warms up
                steps.append(step)
                floors.append(flops / ((before + after) / 2))
                ratios.append(step / floors[-1])
    return [
        median(NAME, f"step at {side}x{side}", steps, "s"),
        median(NAME, "its arithmetic at the matmul rate", floors, "s"),
        Figure(NAME, "matmul rate", flops / statistics.median(floors) / 1e9, "GFLOP/s"),
        median(NAME, "step over floor", ratios, "", GOAL, "lower"),
    ]


def step_seconds(stages: LocalStages, job: DenoiseJob) -> float:
    """Seconds of a step, the median over one request without others."""
    stepped_at: list[float] = []
    stages.dit.submit(job, job.request_id, lambda event: stepped_at.append(time.perf_counter())).done.result()
    return statistics.median(after - before for before, after in pairwise(stepped_at))
