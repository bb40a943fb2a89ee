"""Rectified flow with classifier-free guidance, as pure functions of tensors.

A latent ``x`` is packed as tokens, [tokens, channels] float32; ``v`` are velocities of
the same shape. Time runs from 1 (noise) to 0 (image). Source: the behaviour of the
model authors' sampler; names follow it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from math import factorial

import torch
from torch import Tensor

from bagel_triton.protocol.messages import Branch, FlowSettings

Velocity = Callable[[Tensor, Tensor, Branch], Tensor]
# TaylorSeer's schedule
WARM_UP = 4  # evaluations 0 to 4 are computed
INTERVAL = 3  # and every third from there on
MAX_ORDER = 6


def initial_noise(seed: int, tokens: int, channels: int) -> Tensor:
    """The image's starting noise: one float32 CPU draw, [tokens, channels]."""
    return torch.randn(tokens, channels, generator=torch.Generator("cpu").manual_seed(seed))


def get_timesteps(num_steps: int, shift: float) -> Tensor:
    """Flow times, [num_steps] float32 from 1 to 0; N points make N - 1 updates."""
    t = torch.linspace(1, 0, num_steps)
    shifted: Tensor = shift * t / (1 + (shift - 1) * t)
    return shifted


def guidance_branches(t: Tensor, settings: FlowSettings) -> tuple[Branch, ...]:
    """The branches whose velocity is needed at time ``t``; ``gen`` always comes first."""
    low, high = settings.cfg_interval
    if settings.cfg_text_scale <= 1 or not low < t <= high:
        return (Branch.GEN,)
    if settings.cfg_img_scale <= 1:
        return (Branch.GEN, Branch.CFG_TEXT)
    return (Branch.GEN, Branch.CFG_TEXT, Branch.CFG_IMG)


def _renormed(guided: Tensor, v: Tensor, floor: float, dim: tuple[int, ...]) -> Tensor:
    """``guided`` scaled down to at most the norm of ``v``, by no less than ``floor``."""
    norm = torch.linalg.vector_norm(v, dim=dim, keepdim=True)
    guided_norm = torch.linalg.vector_norm(guided, dim=dim, keepdim=True)
    factor: Tensor = (norm / (guided_norm + 1e-8)).clamp(min=floor, max=1.0)
    return guided * factor


def guide(v: Tensor, text_v: Tensor, image_v: Tensor | None, settings: FlowSettings) -> Tensor:
    """The guided velocity of one image.

    Args:
        v: velocity of the full context.
        text_v: velocity without the prompt.
        image_v: velocity without the images; None switches image guidance off.
    """
    floor = settings.cfg_renorm_min
    guided = text_v + settings.cfg_text_scale * (v - text_v)
    if settings.cfg_renorm_type == "text_channel":
        guided = _renormed(guided, v, floor, dim=(-1,))
    if image_v is not None:
        guided = image_v + settings.cfg_img_scale * (guided - image_v)
    if settings.cfg_renorm_type == "global":
        guided = _renormed(guided, v, floor, dim=(-2, -1))
    elif settings.cfg_renorm_type == "channel":
        guided = _renormed(guided, v, floor, dim=(-1,))
    return guided


def combine(velocities: dict[Branch, Tensor], settings: FlowSettings) -> Tensor:
    """The velocity to follow, from those of the branches that were needed."""
    v = velocities[Branch.GEN]
    if Branch.CFG_TEXT not in velocities:
        return v
    return guide(v, velocities[Branch.CFG_TEXT], velocities.get(Branch.CFG_IMG), settings)


def denoise(x: Tensor, velocity: Velocity, settings: FlowSettings) -> Tensor:
    """The whole flow of one image, one branch at a time: the plain form of the engine's
    work on many images at once."""
    for t, t_next in pairwise(get_timesteps(settings.num_inference_steps, settings.timestep_shift)):
        velocities = {branch: velocity(x, t, branch) for branch in guidance_branches(t, settings)}
        x = x - combine(velocities, settings) * (t - t_next)
    return x


@dataclass
class TaylorSeer:
    """TaylorSeer: most evaluations of a branch are extrapolated from the last computed ones.

    One branch of one image; its counter moves only when the branch is evaluated. Source: "From Reusing to
    Forecasting: Accelerating Diffusion Models with TaylorSeers" (2025), with the schedule of the model authors' code.

    ``factors`` are finite-difference derivatives of the last hidden state before the final
    norm, each [tokens, hidden], the state itself first.
    """

    evaluations: int = 0
    last_computed: int = 0
    factors: list[Tensor] = field(default_factory=list)

    @property
    def due(self) -> bool:
        """Whether the next evaluation has to be computed."""
        return self.evaluations <= WARM_UP or (self.evaluations - WARM_UP) % INTERVAL == 0

    def update(self, hidden: Tensor) -> Tensor:
        """Record a computed evaluation, and return it."""
        factors = [hidden]
        if self.evaluations >= WARM_UP:
            distance = self.evaluations - self.last_computed
            for order, before in enumerate(self.factors[:MAX_ORDER]):
                factors.append((factors[order] - before) / distance)
        self.factors, self.last_computed = factors, self.evaluations
        self.evaluations += 1
        return hidden

    def extrapolate(self) -> Tensor:
        """Extrapolate the next evaluation's hidden state: the sum of f_i * x**i / i!."""
        x = self.evaluations - self.last_computed
        self.evaluations += 1
        state = self.factors[0]
        for order, factor in enumerate(self.factors[1:], start=1):
            state = state + factor * (x**order / factorial(order))
        return state
