"""The published geometry on a GPU: steps against its matrix rate, text against its memory, whole images.

The weights are random and made on the device, so no checkpoint is needed but a tiny one's
tokenizer.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from bagel_triton.deploy.config import DeployConfig, ThinkerConfig, VaeDecodeConfig
from bagel_triton.engine.build import Models
from bagel_triton.model.autoencoder import Autoencoder
from bagel_triton.model.bagel import Bagel
from bagel_triton.model.config import VISION_TOKENS, LanguageConfig, LatentConfig, ModelConfig, VitConfig
from bagel_triton.pipeline.local import LocalStages
from bagel_triton.weights.tiny import checkpoint as tiny_checkpoint
from bagel_triton.weights.tiny.config import TinyConfig
from bench import decode_tokens_per_s
from bench.arithmetic import matmul_rate, step_flops, synchronize
from bench.dit_step_over_floor import step_seconds
from bench.figure import Figure, median, repeated
from bench.setting import WAIT_S, Setting, answer, denoise_job, image_request

Module = TypeVar("Module", bound=nn.Module)
NAME = "published_on_gpu"
PUBLISHED = ModelConfig(
    language=LanguageConfig(3584, 18944, 28, 28, 4, 128, 152064, 1e6, 1e-6),
    latent=LatentConfig(2, 16, 8, 64),
    vit=VitConfig(1152, 4304, 26, 16, 14, 1e-6, 70),
)
AUTOENCODER_WIDTHS = (128, 256, 512, 512)
IMAGES = ((512, 20), (1024, 50))  # side in pixels, steps
PEAK_SHAPE = 8192
COPY_BYTES = 1 << 30


def run(setting: Setting) -> list[Figure]:
    """All figures; on a CUDA device only."""
    device = torch.device(setting.device)
    torch.cuda.reset_peak_memory_stats(device)
    models = random_models(PUBLISHED, AUTOENCODER_WIDTHS, device, torch.bfloat16)
    with tempfile.TemporaryDirectory(prefix="bagel_triton_") as folder:
        directory = Path(folder) / "tokenizer"
        tiny_checkpoint.write(directory, TinyConfig())
        config = DeployConfig(
            str(directory),
            device=setting.device,
            dtype="bfloat16",
            thinker=ThinkerConfig(lease_ttl_s=WAIT_S),
            vae_decode=VaeDecodeConfig(use_tiling=False),  # as serve chooses where there is room
        )
        stages = LocalStages(config, models=models)
        try:
            figures = measure(stages, models, IMAGES, setting.trials)
        finally:
            stages.close()
    peak = torch.cuda.max_memory_allocated(device) / 2**30
    return [*figures, Figure(NAME, "peak memory", peak, "GiB")]


def measure(
    stages: LocalStages, models: Models, images: Sequence[tuple[int, int]], trials: int, peak_shape: int = PEAK_SHAPE
) -> list[Figure]:
    """Steps, text and whole images of stages that run ``models``."""
    device, dtype = stages.dit.placement
    peak = matmul_rate([(peak_shape, peak_shape)], peak_shape, device, dtype)
    figures = [Figure(NAME, "matmul peak", peak / 1e12, "TFLOP/s")]
    for side, steps in images:
        job = denoise_job(stages, image_request(side, side, 10))
        latents = (side // models.config.latent.stride) ** 2
        flops = step_flops(models.config, [(latents + VISION_TOKENS, handle.tokens) for handle in job.handles])
        rate = flops / step_seconds(stages, job)
        figures.append(Figure(NAME, f"a step at {side}x{side}", rate / 1e12, "TFLOP/s"))
        figures.append(Figure(NAME, f"a step at {side}x{side} over the peak", rate / peak, ""))
        seconds = repeated(trials, partial(_image_seconds, stages, side, steps))
        figures.append(median(NAME, f"image of {side}x{side}, {steps} steps", seconds, "s"))
    bandwidth = copy_rate(device)
    read = sum(weight.nbytes for name, weight in models.bagel.state_dict().items() if _read_by_text(name))
    texts = decode_tokens_per_s.measure(stages, decode_tokens_per_s.COUNTS, decode_tokens_per_s.TOKENS, trials)
    bound = Figure(NAME, "tokens/s of 1 sequence over the memory's bound", texts[0].value * read / bandwidth, "")
    return [*figures, Figure(NAME, "memory bandwidth", bandwidth / 1e9, "GB/s"), *texts, bound]


def random_models(config: ModelConfig, widths: Sequence[int], device: torch.device, dtype: torch.dtype) -> Models:
    """Networks of ``config`` with random weights, made on ``device``; an autoencoder of ``widths`` in float32."""
    with torch.device("meta"):
        bagel, autoencoder = Bagel(config).to(dtype), Autoencoder(autoencoder_shapes(config, widths))
    return Models(config, _drawn(bagel, device), _drawn(autoencoder, device))


def autoencoder_shapes(config: ModelConfig, widths: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors that an autoencoder's widths are read from."""
    shapes: dict[str, tuple[int, ...]] = {
        f"decoder.up.{level}.block.0.conv1.weight": (width,) for level, width in enumerate(widths)
    }
    shapes |= {f"decoder.up.0.block.{block}.conv1.weight": (widths[0],) for block in range(3)}
    shapes |= {f"encoder.down.0.block.{block}.conv1.weight": (widths[0],) for block in range(2)}
    return shapes | {"decoder.conv_out.weight": (3,), "decoder.conv_in.weight": (widths[-1], config.latent.channels)}


def _drawn(module: Module, device: torch.device) -> Module:
    """``module`` on ``device``, each weight scaled by its fan-in, norms at one."""
    module = module.to_empty(device=device).requires_grad_(False)
    for weight in module.parameters():
        if weight.dim() > 1:
            weight.normal_(std=weight[0].numel() ** -0.5)
        else:
            weight.fill_(1.0)
    return module


def copy_rate(device: torch.device, size: int = COPY_BYTES) -> float:
    """Bytes per second that a copy reads and writes."""
    source, target = (torch.ones(size, dtype=torch.uint8, device=device) for _ in range(2))

    def trial() -> float:
        synchronize(device)
        started = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        return time.perf_counter() - started

    return 2 * size / sorted(repeated(5, trial))[2]


def _read_by_text(name: str) -> bool:
    """Whether a weight is read for every token of text: not the embedding, nor the generation experts."""
    return name.startswith("language_model.") and not any(part in name for part in (".gen.", "moe_gen", "embed_tokens"))


def _image_seconds(stages: LocalStages, side: int, steps: int) -> float:
    """From the request to its pixels."""
    started = time.perf_counter()
    job = denoise_job(stages, image_request(side, side, steps))
    latents, _ = answer(stages.denoise(job))
    answer(stages.decode(latents[0], job.request_id, job.scheduling))
    return time.perf_counter() - started
