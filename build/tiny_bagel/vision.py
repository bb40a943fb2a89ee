"""Pre-training of the understanding encoder: what is where, by labels, before it feeds the transformer.

BAGEL's encoder is a pre-trained SigLIP. An untrained one beside an untrained transformer learns
late: after 23,000 descriptions and answers the transformer still named only the background.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bagel_triton.model.bagel import Bagel
from bagel_triton.model.image import patchified
from build.tiny_bagel.data import training_scene, vit_pixels
from build.tiny_bagel.forward import VIT_PATCH, embed_images
from build.tiny_bagel.parallel import Ranks
from build.tiny_bagel.world import COLORS, DIAMETERS, KINDS, PLACES, Scene, render

BATCH = 48
LEARNING_RATE = 2e-3
MODULES = ("vit_model", "connector", "vit_pos_embed")
"""Those that are trained here."""
_NAMES = {"kind": (*KINDS, ""), "color": (*COLORS, ""), "place": (*PLACES, ""), "size": (*DIAMETERS, "")}
CLASSES = (*(len(names) for _ in range(2) for names in _NAMES.values()), len(COLORS), len(COLORS))


def labels(scene: Scene) -> list[int]:
    """The number of each property of the first and the second thing, and of the background's two colors."""
    found = []
    for index in range(2):
        thing = scene.things[index] if index < len(scene.things) else None
        found += [names.index(getattr(thing, name) if thing else "") for name, names in _NAMES.items()]
    colors = list(COLORS)
    return [*found, colors.index(scene.background[0]), colors.index(scene.background[-1])]


def patches(scenes: list[Scene]) -> Tensor:
    """The scenes as the encoder gets them: [scenes, patches, 3 * patch * patch]."""
    seen = [torch.from_numpy(vit_pixels(render(scene)).copy()).float() / 127.5 - 1.0 for scene in scenes]
    return torch.stack([patchified(pixels, VIT_PATCH) for pixels in seen])


def train(
    model: Bagel,
    rng: random.Random,
    minutes: float,
    report: Callable[[float, int, dict[str, float]], None],
    ranks: Ranks,
) -> None:
    """Train :data:`MODULES` so that the mean of an image's rows tells its labels by linear heads, then dropped."""
    heads = nn.Linear(model.config.language.hidden_size, sum(CLASSES))
    trained = [value for name in MODULES for value in getattr(model, name).parameters()]
    trained += [*heads.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.02, fused=True)
    began, step, share = time.monotonic(), 0, 0.0
    while share < 1:
        rate = LEARNING_RATE * min(1.0, (step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * share)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        scenes = [training_scene(rng) for _ in range(BATCH)]
        wanted = torch.from_numpy(np.array([labels(scene) for scene in scenes]))
        rows = embed_images(model, patches(scenes)).unflatten(0, (BATCH, -1))
        scores = heads(rows.mean(1)).split(CLASSES, dim=1)
        parts = [F.cross_entropy(part, wanted[:, index]) for index, part in enumerate(scores)]
        loss = torch.stack(parts).sum()
        right = torch.stack([part.argmax(1) == wanted[:, index] for index, part in enumerate(scores)])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        clock = (time.monotonic() - began) / (60 * minutes)
        shown = [loss.item(), 1 - right.all(0).float().mean().item()]
        share, *shown = ranks.average(trained, [clock, *shown])
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        step += 1
        report(share, step, {"loss": shown[0], "wrong": shown[1], "rate": rate})
