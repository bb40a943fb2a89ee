"""``serve_overhead``: what a whole HTTP request takes beyond the engines' own time for it.

The engines' time is the sum of ``run_s`` of the stages in the request's own reply, so the
rest is everything else: HTTP, JSON, PNG and base64, Triton, queues, and the hand-off between
stages.
"""

from __future__ import annotations

import statistics
import time

import httpx

from bagel_triton.serving.process import ServerProcess, running
from bench.figure import Figure, median
from bench.setting import WAIT_S, Setting

NAME = "serve_overhead"
SIDE, STEPS = 512, 20
GOAL_SHARE, GOAL_MS = 0.02, 20.0


def run(setting: Setting, side: int = SIDE, steps: int = STEPS) -> list[Figure]:
    """Seconds of a request, and what of them is overhead; of its two goals one is enough."""
    with running(setting.checkpoint, "--device", setting.device) as server:
        trials = [_request(server, side, steps, seed) for seed in range(1 + setting.trials)][1:]
    overheads = [(whole - engines) * 1e3 for whole, engines in trials]
    shares = [(whole - engines) / whole for whole, engines in trials]
    in_ms = statistics.median(overheads) <= GOAL_MS
    return [
        median(NAME, f"request, {side}x{side}, {steps} steps", [whole for whole, _ in trials], "s"),
        median(NAME, "overhead", overheads, "ms", GOAL_MS if in_ms else None, "lower" if in_ms else None),
        median(NAME, "overhead's share", shares, "", None if in_ms else GOAL_SHARE, None if in_ms else "lower"),
    ]


def _request(server: ServerProcess, side: int, steps: int, seed: int) -> tuple[float, float]:
    """Seconds of the request, and of the engines in it."""
    body = {
        "messages": [{"role": "user", "content": "A cute cat"}],
        "modalities": ["image"],
        "height": side,
        "width": side,
        "num_inference_steps": steps,
        "seed": seed,
    }
    started = time.perf_counter()
    response = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=WAIT_S, trust_env=False)
    whole = time.perf_counter() - started
    response.raise_for_status()
    stages = response.json()["metrics"]["stages"]
    return whole, sum(stage["run_s"] for stage in stages.values())
