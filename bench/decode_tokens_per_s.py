"""``decode_tokens_per_s``: greedy text for 1, 8 and 32 concurrent requests, with the prefill of their short prompts."""

from __future__ import annotations

import time
from collections.abc import Sequence

from bagel_triton.pipeline.local import LocalStages
from bagel_triton.protocol.messages import ThinkerOutput
from bagel_triton.protocol.request import GenerationRequest
from bench.figure import Figure, median
from bench.setting import Setting, answer, plan_of

NAME = "decode_tokens_per_s"
COUNTS = (1, 8, 32)
TOKENS = 64
GOAL = 4.0  # of the most sequences over one


def run(setting: Setting, counts: Sequence[int] = COUNTS, tokens: int = TOKENS) -> list[Figure]:
    """Tokens per second for each number of sequences, and the gain of the most over one."""
    with setting.stages() as stages:
        return measure(stages, counts, tokens, setting.trials)


def measure(stages: LocalStages, counts: Sequence[int], tokens: int, trials: int) -> list[Figure]:
    """The figures of ``stages``."""
    rates: dict[int, list[float]] = {count: [] for count in counts}
    prompts = _long_prompts(stages, max(counts), tokens)
    for trial in range(1 + trials):
        for count in counts:
            started = time.perf_counter()
            outputs = _together(stages, prompts[:count], tokens)
            seconds = time.perf_counter() - started
            if trial:  # the first warms up
                rates[count].append(sum(one.answers[0].tokens for one in outputs) / seconds)
    gains = [most / one for most, one in zip(rates[counts[-1]], rates[counts[0]], strict=True)]
    figures = [median(NAME, f"{count} sequences", found, "tokens/s") for count, found in rates.items()]
    return [*figures, median(NAME, f"{counts[-1]} over {counts[0]}", gains, "x", GOAL, "higher")]


def _long_prompts(stages: LocalStages, count: int, tokens: int) -> list[str]:
    """Prompts whose answers have ``tokens`` tokens or more, so that no text leaves the batch early."""
    found: list[str] = []
    for start in range(0, 8 * count, count):
        prompts = [f"Count the cats of image {start + number}." for number in range(count)]
        for prompt, one in zip(prompts, _together(stages, prompts, tokens), strict=True):
            if one.answers[0].finish_reason == "length":
                found.append(prompt)
        if len(found) >= count:
            return found[:count]
    raise ValueError(f"this checkpoint ends its texts early: only {len(found)} of {8 * count} prompts are of use")


def _together(stages: LocalStages, prompts: Sequence[str], tokens: int) -> list[ThinkerOutput]:
    plans = [
        plan_of(stages, GenerationRequest(prompt=prompt, modality="text", max_tokens=tokens)) for prompt in prompts
    ]
    calls = [stages.think(plan) for plan in plans]
    return [answer(call)[0] for call in calls]
