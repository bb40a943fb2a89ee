"""``prefix_reuse_speedup``: the prefill of a second edit of an image against that of the first."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from bagel_triton.pipeline.local import LocalStages
from bagel_triton.protocol.request import GenerationRequest
from bench.figure import Figure, median
from bench.setting import Setting, answer, plan_of

NAME = "prefix_reuse_speedup"
SIDE = 512
GOAL = 3.0


def run(setting: Setting, side: int = SIDE) -> list[Figure]:
    """Seconds of the first and the second edit's prefill, and their ratio; each trial has an image of its own."""
    firsts, seconds = [], []
    with setting.stages() as stages:
        for trial in range(1 + setting.trials):
            image = _image(side, trial)
            first = _prefill_seconds(stages, image, "Make it night")
            second = _prefill_seconds(stages, image, "Give the cat a hat")
            if trial:  # the first warms up
                firsts.append(first)
                seconds.append(second)
    ratios = [first / second for first, second in zip(firsts, seconds, strict=True)]
    return [
        median(NAME, f"first edit of {side}x{side}", firsts, "s"),
        median(NAME, "second edit", seconds, "s"),
        median(NAME, "first over second", ratios, "x", GOAL, "higher"),
    ]


def _prefill_seconds(stages: LocalStages, image: bytes, prompt: str) -> float:
    plan = plan_of(stages, GenerationRequest(prompt=prompt, image=(image,), num_inference_steps=2, seed=0))
    _, stats = answer(stages.think(plan))
    stages.abort(plan.request_id)  # its contexts were all that is wanted
    return stats.run_s


def _image(side: int, seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, "PNG")
    return encoded.getvalue()
