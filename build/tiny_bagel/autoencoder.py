"""Training of the small autoencoder: the published architecture, narrow, on images of the world.

The encoder has no residual blocks beside its middle, as the world is flat colors and edges. The
decoder has one a level; that at full resolution, most of its work, stays the identity. The
posterior's variance is a constant: the decoder learns with that noise, so it forgives a flow that
ends a little beside an encoded image.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bagel_triton.model.autoencoder import SCALE, SHIFT, Autoencoder
from build.tiny_bagel.optimizer import Muon
from build.tiny_bagel.parallel import Ranks
from build.tiny_bagel.world import SIDE, Pixels

LATENT_CHANNELS = 16
WIDTH = 64
LEVELS = 4
Stage = Literal["new", "refine", "decoder"]
STAGES: tuple[Stage, ...] = ("new", "refine", "decoder")
BATCH = 4
"""Of each process; twice as many crops."""
CROP = 32
CROP_SHARE = 0.5
"""Of the time, the first part: crops are a quarter of the work. The norms see whole images, so these come last."""
RATES = {"new": (5e-3, 1e-3), "refine": (1.5e-3, 4e-4), "decoder": (1.5e-3, 4e-4)}
"""Of Muon for the kernels and of AdamW for the rest, at the start of each stage."""
EDGE_WEIGHT = 1.0
"""Of the differences between neighbors: without it outlines stay blurred, as they are few pixels."""
NOISE = 0.12
"""Standard deviation of the posterior, where latents have about 1."""
SIZE_WEIGHT = 1e-3
CONSTANT_SHARE = 0.3
"""Of the time; then the rates fall to zero in a straight line."""


def shapes() -> dict[str, tuple[int, ...]]:
    """What :class:`Autoencoder` reads its geometry from."""
    decoder: dict[str, tuple[int, ...]] = {
        f"decoder.up.{level}.block.0.conv1.weight": (WIDTH, WIDTH, 3, 3) for level in range(LEVELS)
    }
    return decoder | {
        "decoder.conv_out.weight": (3, WIDTH, 3, 3),
        "decoder.conv_in.weight": (WIDTH, LATENT_CHANNELS, 3, 3),
    }


def new() -> Autoencoder:
    """An untrained autoencoder; torch's generator decides its weights."""
    model = Autoencoder(shapes())
    with torch.no_grad():
        # Every residual branch starts at nothing.
        for name, module in model.named_modules():
            if name.endswith(("conv2", "proj_out")):
                assert isinstance(module, nn.Conv2d)
                assert module.bias is not None
                nn.init.zeros_(module.weight)
                nn.init.zeros_(module.bias)
        _constant_variance(model, torch.full((LATENT_CHANNELS,), NOISE))
    return model.to(memory_format=torch.channels_last)  # type: ignore[no-any-return, call-overload]


def _constant_variance(model: Autoencoder, deviation: Tensor) -> None:
    """Give the posterior this standard deviation, [channels], in units of the normalised latent."""
    head = model.encoder.conv_out
    assert head.bias is not None
    head.weight[LATENT_CHANNELS:] = 0
    head.bias[LATENT_CHANNELS:] = 2 * torch.log(deviation / SCALE)


def as_input(images: Pixels) -> Tensor:
    """uint8 [batch, height, width, 3] -> [batch, 3, height, width] in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def means(model: Autoencoder, images: Tensor) -> Tensor:
    """Normalised latents without noise: [batch, channels, h, w]."""
    mean: Tensor = model.encoder(images)[:, :LATENT_CHANNELS]
    return SCALE * (mean - SHIFT)


def reconstruct(model: Autoencoder, latents: Tensor) -> Tensor:
    """Images of normalised latents, about [-1, 1]: the decoder without its block at full resolution."""
    decoder = model.decoder
    x = decoder.mid(decoder.conv_in(latents / SCALE + SHIFT))
    for level in reversed(decoder.up[1:]):
        x = level(x)
    return decoder.conv_out(F.silu(decoder.norm_out(x)))  # type: ignore[no-any-return]


def deviation(model: Autoencoder) -> Tensor:
    """The posterior's standard deviation in units of the normalised latent, [channels]."""
    assert model.encoder.conv_out.bias is not None
    return SCALE * torch.exp(model.encoder.conv_out.bias[LATENT_CHANNELS:] / 2)


def train(
    model: Autoencoder,
    images: Callable[[int, int], Pixels],
    minutes: float,
    report: Callable[[float, int, dict[str, float]], None],
    ranks: Ranks,
    stage: Stage,
) -> int:
    """Train for ``minutes`` of wall-clock time; the number of steps.

    Args:
        images: so many images of the world, or crops of them, of this side: uint8 [n, side, side, 3].
        report: called after each step with the share of the time that is over, the step and its losses.
        stage: ``new`` begins with crops; ``decoder`` leaves the encoder, and so the latents, as they are.
    """
    decoder_only = stage == "decoder"
    model.encoder.requires_grad_(not decoder_only)
    trained = [value for value in model.parameters() if value.requires_grad]
    kernels = [value for value in trained if value.ndim == 4 and min(value.shape[:2]) >= LATENT_CHANNELS]
    chosen = {id(value) for value in kernels}
    muon = Muon(kernels, ranks)
    adam = torch.optim.AdamW(
        [value for value in trained if id(value) not in chosen], betas=(0.9, 0.98), weight_decay=0, fused=True
    )
    rates = RATES[stage]
    crops = CROP_SHARE if stage == "new" else 0.0
    began, step = time.monotonic(), 0
    averaged = {name: value.detach().clone() for name, value in model.named_parameters()}
    spread = deviation(model).detach()
    noise = spread[:, None, None]
    share = 0.0
    while share < 1:
        factor = min(1.0, (step + 1) / 50) * min(1.0, (1 - share) / (1 - CONSTANT_SHARE))
        for group in adam.param_groups:
            group["lr"] = rates[1] * factor
        pixels = as_input(images(2 * BATCH, CROP) if share < crops else images(BATCH, SIDE))
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        with torch.set_grad_enabled(not decoder_only):
            latents = means(model, pixels)
        drawn = reconstruct(model, latents + noise * torch.randn_like(latents))
        absolute, squared = F.l1_loss(drawn, pixels), F.mse_loss(drawn, pixels)
        size = latents.square().mean()
        edges = sum(F.l1_loss(drawn.diff(dim=axis), pixels.diff(dim=axis)) for axis in (2, 3))
        loss = absolute + 2 * squared + EDGE_WEIGHT * edges + SIZE_WEIGHT * size
        model.zero_grad(set_to_none=True)
        loss.backward()
        clock = (time.monotonic() - began) / (60 * minutes)
        share, *shown = ranks.average(model.parameters(), [clock, absolute.item(), squared.item(), size.item()])
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        muon.step(rates[0] * factor)
        adam.step()
        with torch.no_grad():
            if not decoder_only:
                _constant_variance(model, spread)
            decay = min(0.995, step / (step + 20))
            for name, value in model.named_parameters():
                averaged[name].lerp_(value, 1 - decay)
        step += 1
        report(share, step, dict(zip(("l1", "mse", "size", "lr"), (*shown, rates[0] * factor), strict=True)))
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.copy_(averaged[name])
    return step


@torch.no_grad()
def normalise(model: Autoencoder, images: Tensor) -> None:
    """Scale each latent channel to a deviation of 1 on ``images``; what is decoded stays the same."""
    mean = model.encoder(images)[:, :LATENT_CHANNELS]
    factor = 1 / (SCALE * mean.std(dim=(0, 2, 3)))  # [channels]
    head = model.encoder.conv_out
    assert head.bias is not None
    head.weight[:LATENT_CHANNELS] *= factor[:, None, None, None]
    head.bias[:LATENT_CHANNELS] *= factor
    model.decoder.conv_in.weight /= factor[:, None, None]
    _constant_variance(model, NOISE * factor)
