"""``parallel``: DiT and decoder on two ranks of half the threads against one rank of all, and what ranks send.

Bytes are those that the loopback interface counts while images are denoised or decoded, so they are of a quiet
machine, and each has TCP's own, about a thousandth. The formulas are those of docs/scaling.md.
"""

from __future__ import annotations

import time
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from bagel_triton.deploy.config import DeployConfig, DitConfig, ThinkerConfig, VaeDecodeConfig
from bagel_triton.engine.dit.run import Latents
from bagel_triton.model.autoencoder import GROUPS, Decoder
from bagel_triton.model.config import VISION_TOKENS, LanguageConfig
from bagel_triton.pipeline.local import LocalStages
from bagel_triton.protocol.messages import SchedulingParams
from bagel_triton.weights.checkpoint import Checkpoint, inspect
from bench.arithmetic import products
from bench.figure import Figure, median, repeated
from bench.setting import WAIT_S, Setting, answer, denoise_job, image_request

NAME = "parallel"
RANKS, BRANCHES = 2, 2  # the third branch is the first
SIDE, STEPS, GOAL = 256, 5, 0.75
SENT = Path("/sys/class/net/lo/statistics/tx_bytes")
MODES = {
    "tensor_parallel_size": DitConfig(tensor_parallel_size=RANKS),
    "cfg_parallel_size": DitConfig(cfg_parallel_size=RANKS),
    "ulysses_degree": DitConfig(ulysses_degree=RANKS),
    "use_hsdp": DitConfig(use_hsdp=True, hsdp_shard_size=RANKS),
}
PATCH = "vae_patch_parallel_size"
NO_GOAL = ("use_hsdp", PATCH)  # which save memory
Trials = tuple[list[float], list[float]]  # seconds and bytes of a step or an image


def run(setting: Setting, side: int = SIDE) -> list[Figure]:
    """For each mode the speed of two ranks over one rank's, and its bytes over the formula's."""
    language, latents = inspect(str(setting.checkpoint)).language, (side // 16) ** 2
    alone = _steps(setting, DitConfig(), side)
    figures: list[Figure] = []
    for name, dit in MODES.items():
        expected = step_bytes(name, language, latents, RANKS)
        figures += _compared(name, "step", alone, _steps(setting, dit, side), expected)
    decoder = Checkpoint(str(setting.checkpoint)).load_autoencoder(torch.device("cpu"), torch.float32).decoder
    expected = image_bytes(decoder, side // 8, side // 8, RANKS)
    one, several = (_images(setting, VaeDecodeConfig(patch_parallel_size=ranks), side) for ranks in (1, RANKS))
    return [*figures, *_compared(PATCH, "image", one, several, expected)]


def _compared(name: str, unit: str, alone: Trials, several: Trials, expected: int) -> list[Figure]:
    speeds = [one / two for one, two in zip(alone[0], several[0], strict=True)]
    goal = () if name in NO_GOAL else (GOAL, "higher")
    return [
        median(NAME, f"{name}: {RANKS} ranks over one", speeds, "x", *goal),
        median(NAME, f"{name}: bytes of a {unit}", several[1], "B"),
        median(NAME, f"{name}: bytes over the formula", [count / expected for count in several[1]], "x"),
    ]


def step_bytes(mode: str, config: LanguageConfig, latents: int, ranks: int, branches: int = BRANCHES) -> int:
    """Bytes that all ranks together send in a step of one image of so many ``latents``, in float32."""
    rows, wanted = branches * (latents + VISION_TOKENS), branches * latents
    row = 4 * config.hidden_size
    others = ranks - 1
    if mode == "tensor_parallel_size":  # two sums a layer; in a ring each rank sends all but 1/ranks twice
        return others * rows * row + config.num_layers * 2 * (2 * others * rows * row)
    away = rows * row * others // ranks + wanted * row * others // ranks  # embeddings out, hidden states back
    if mode == "cfg_parallel_size":
        return away
    if mode == "use_hsdp":  # one copy of the weights over all ranks: each gets what it has not
        return away + config.num_layers * 4 * layer_numbers(config) * others
    heads = 2 * config.num_heads + 2 * config.num_kv_heads  # queries and what they found, keys and values
    return away + config.num_layers * rows * heads * config.head_dim * 4 * others // ranks


def layer_numbers(config: LanguageConfig) -> int:
    """Numbers in the weights of a layer, both experts."""
    bias = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    norms = 2 * config.hidden_size + 2 * config.head_dim
    return 2 * (sum(inner * outer for inner, outer in products(config)) + bias + norms)


def image_bytes(decoder: Decoder, height: int, width: int, ranks: int) -> int:
    """Bytes that all ranks together send for an image of ``height`` x ``width`` latents, in float32.

    As if ``ranks`` divided the rows.
    """
    top, others = decoder.conv_in.out_channels, ranks - 1
    maps = [(top, 1)] * 4  # whose rows next to another rank's are exchanged: channels, and width over the latents'
    scale = 1
    for level in reversed(decoder.up):
        blocks: list[Any] = list(level.block)  # type: ignore[arg-type]
        maps += [(conv.in_channels, scale) for block in blocks for conv in (block.conv1, block.conv2)]
        if level.upsample is not None:
            maps.append((blocks[-1].conv2.out_channels, scale))
            scale *= 2
    maps.append((decoder.conv_out.in_channels, scale))
    edges = 2 * width * sum(channels * factor for channels, factor in maps)
    area = height * width
    norms = sum(isinstance(module, torch.nn.GroupNorm) for module in decoder.modules())
    statistics = norms * ranks * 3 * GROUPS * 8
    pixels = decoder.conv_out.out_channels * area * scale**2
    return others * (4 * (decoder.conv_in.in_channels * area + edges + top * area) + statistics) + (
        4 * pixels * others // ranks
    )


def _steps(setting: Setting, dit: DitConfig, side: int) -> Trials:
    """Of each trial."""
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


def _images(setting: Setting, decoder: VaeDecodeConfig, side: int) -> Trials:
    """Of each trial, in which one image of random latents is decoded."""
    sent: list[float] = []
    config = DeployConfig(str(setting.checkpoint), device=setting.device, vae_decode=decoder)
    tokens = inspect(config.checkpoint).latent.token_channels
    latents = Latents(torch.randn((side // 16) ** 2, tokens), side // 16, side // 16)
    with closing(LocalStages(config)) as stages:

        def seconds() -> float:
            before, started = int(SENT.read_text()), time.perf_counter()
            answer(stages.decode(latents, "", SchedulingParams()))
            sent.append(int(SENT.read_text()) - before)
            return time.perf_counter() - started

        found = repeated(setting.trials, seconds)
    return found, sent[1:]
