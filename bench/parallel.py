"""``parallel``: the DiT on two ranks of half the threads against one rank of all of them, and what its ranks send.

Bytes are those that the loopback interface counts while images are denoised, so they are of a quiet machine, and
each has TCP's own, about a thousandth. The formulas are those of docs/scaling.md.
"""

from __future__ import annotations

import time
from contextlib import closing
from pathlib import Path

from bagel_triton.deploy.config import DeployConfig, DitConfig, ThinkerConfig
from bagel_triton.model.config import VISION_TOKENS, LanguageConfig
from bagel_triton.pipeline.local import LocalStages
from bagel_triton.weights.checkpoint import inspect
from bench.figure import Figure, median, repeated
from bench.setting import WAIT_S, Setting, denoise_job, image_request

NAME = "parallel"
RANKS, BRANCHES = 2, 2  # the third branch is the first
SIDE, STEPS, GOAL = 256, 5, 0.75
SENT = Path("/sys/class/net/lo/statistics/tx_bytes")
MODES = {
    "tensor_parallel_size": DitConfig(tensor_parallel_size=RANKS),
    "cfg_parallel_size": DitConfig(cfg_parallel_size=RANKS),
    "ulysses_degree": DitConfig(ulysses_degree=RANKS),
}


def run(setting: Setting, side: int = SIDE) -> list[Figure]:
    """For each mode the speed of two ranks over one rank's, and its bytes over the formula's."""
    language = inspect(str(setting.checkpoint)).language
    alone, _ = _measured(setting, DitConfig(), side)
    figures: list[Figure] = []
    for name, dit in MODES.items():
        seconds, sent = _measured(setting, dit, side)
        speeds = [one / two for one, two in zip(alone, seconds, strict=True)]
        figures.append(median(NAME, f"{name}: {RANKS} ranks over one", speeds, "x", GOAL, "higher"))
        expected = step_bytes(name, language, (side // 16) ** 2, RANKS)
        figures.append(median(NAME, f"{name}: bytes a step", sent, "B"))
        figures.append(median(NAME, f"{name}: bytes over the formula", [count / expected for count in sent], "x"))
    return figures


def step_bytes(mode: str, config: LanguageConfig, latents: int, ranks: int, branches: int = BRANCHES) -> int:
    """Bytes that all ranks together send in a step of one image of so many ``latents``, in float32."""
    rows, wanted = branches * (latents + VISION_TOKENS), branches * latents
    row = 4 * config.hidden_size
    others = ranks - 1
    if mode == "tensor_parallel_size":  # two sums a layer; in a ring each rank sends all but 1/ranks twice
        return others * rows * row + config.num_layers * 2 * (2 * others * rows * row)
    away = rows * row * others // ranks + wanted * row * others // ranks
    if mode == "cfg_parallel_size":  # embeddings out, hidden states back
        return away
    heads = 2 * config.num_heads + 2 * config.num_kv_heads  # queries and what they found, keys and values
    return away + config.num_layers * rows * heads * config.head_dim * 4 * others // ranks


def _measured(setting: Setting, dit: DitConfig, side: int) -> tuple[list[float], list[float]]:
    """Seconds and bytes a step, of each trial."""
    sent: list[float] = []
    config = DeployConfig(
        str(setting.checkpoint), device=setting.device, thinker=ThinkerConfig(lease_ttl_s=WAIT_S), dit=dit
    )
    with closing(LocalStages(config)) as stages:

        def seconds() -> float:
            # A run of one step more has the same contexts to send, so the difference is that of steps.
            few, many = (_denoised(stages, side, steps) for steps in (2, 2 + STEPS))
            sent.append((many[1] - few[1]) / STEPS)
            return (many[0] - few[0]) / STEPS

        found = repeated(setting.trials, seconds)
    return found, sent[1:]


def _denoised(stages: LocalStages, side: int, steps: int) -> tuple[float, int]:
    """Seconds and bytes from handing a request to the DiT, contexts ready, until it is done."""
    job = denoise_job(stages, image_request(side, side, steps))
    before, started = int(SENT.read_text()), time.perf_counter()
    stages.dit.submit(job, job.request_id, lambda event: None).done.result()
    return time.perf_counter() - started, int(SENT.read_text()) - before
