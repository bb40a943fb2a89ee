"""The DiT's workspace on a GPU: one tensor, made once, whose slots requests take and give back.

No step allocates keys and values, so none runs out of memory: a job that finds no slots waits in the queue. Every
context takes one run of consecutive slots, with room for a step's new tokens behind it. Addresses stay, as CUDA graphs
need.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from bagel_triton.kv.store import store_shape
from bagel_triton.model.config import ModelConfig, segment_tokens
from bagel_triton.protocol.messages import KVGeometry, VaeSegment, VitSegment

PROMPT_TOKENS = 256  # of a long prompt
BRANCHES = 3


class WorkspacePool:
    """``slots`` slots of ``store``, ``[layers, 2, slots, kv_heads, head_dim]``; not thread-safe."""

    def __init__(self, geometry: KVGeometry, slots: int, dtype: torch.dtype, device: torch.device) -> None:
        self.store = torch.empty(store_shape(geometry, slots), dtype=dtype, device=device)
        self.slots = slots
        self._free = [slice(0, slots)]  # ascending, none adjacent to the next

    def take(self, sizes: Sequence[int]) -> list[slice] | None:
        """A run of slots for each size, the first that fits; None, and nothing taken, where one finds none."""
        free, taken = list(self._free), []
        for size in sizes:
            at = next((at for at, run in enumerate(free) if run.stop - run.start >= size), None)
            if at is None:
                return None
            run = free.pop(at)
            taken.append(slice(run.start, run.start + size))
            if run.start + size < run.stop:
                free.insert(at, slice(run.start + size, run.stop))
        self._free = free
        return taken

    def give_back(self, taken: Sequence[slice]) -> None:
        """Return runs that were taken."""
        joined: list[slice] = []
        for run in sorted([*self._free, *taken], key=lambda run: run.start):
            if joined and joined[-1].stop == run.start:
                joined[-1] = slice(joined[-1].start, run.stop)
            else:
                joined.append(run)
        self._free = joined


def workspace_tokens(config: ModelConfig, images: int, height: int, width: int) -> int:
    """Slots for ``images`` edits of that size in pixels at the same time."""
    new = BRANCHES * latent_tokens(config, height, width)
    return images * (sum(context_tokens(config, height, width)) + new)


def latent_tokens(config: ModelConfig, height: int, width: int) -> int:
    """Tokens of an image that is being made, with its markers."""
    return segment_tokens(VaeSegment(height, width, bytes(height * width * 3)), config)


def context_tokens(config: ModelConfig, height: int, width: int) -> tuple[int, int, int]:
    """Tokens of the contexts ``gen``, ``cfg_text`` and ``cfg_img`` of editing an image with a long prompt."""
    resized_width, resized_height = config.vae_resize.size(width, height)
    seen_width, seen_height = config.vit_resize.size(resized_width, resized_height)
    image = latent_tokens(config, resized_height, resized_width)
    image += segment_tokens(VitSegment(seen_height, seen_width, bytes(seen_height * seen_width * 3)), config)
    return image + PROMPT_TOKENS, image, PROMPT_TOKENS
