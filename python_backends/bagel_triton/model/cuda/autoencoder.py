"""The autoencoder on a GPU: whole images, in bfloat16 and channels last, with norms in float32.

Its time is that of its convolutions, which tensor cores take in bfloat16 with the channels of a pixel side by side. A
norm subtracts two large sums, so it is computed in float32 and rounded once. No GPU has run this yet; tests compare it
with float32 on a CPU.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Network = TypeVar("Network", bound=nn.Module)


class Float32Norm(nn.Module):
    """``norm`` of a map in another dtype; torch's kernel for it takes rows of one channel at a time."""

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        """x [batch, channels, height, width], same shape and dtype out."""
        wide = self.norm(x.to(torch.float32, memory_format=torch.contiguous_format))
        return wide.to(x.dtype, memory_format=torch.channels_last)  # type: ignore[no-any-return]


def in_bfloat16(network: Network) -> Network:
    """A copy of a float32 encoder or decoder that computes in bfloat16; the norms' weights are the same memory."""
    replaced: dict[int, Any] = {}  # by id, as deepcopy keeps what it has copied
    for module in network.modules():
        if isinstance(module, nn.GroupNorm):
            replaced[id(module)] = Float32Norm(module)
        elif isinstance(module, nn.Conv2d):
            for weight in module.parameters():
                layout = torch.channels_last if weight.dim() == 4 else torch.preserve_format
                half = weight.detach().to(torch.bfloat16, memory_format=layout)
                replaced[id(weight)] = nn.Parameter(half, requires_grad=False)
    return copy.deepcopy(network, replaced)


def whole(network: nn.Module) -> Callable[[Tensor], Tensor]:
    """Make a function that runs an encoder or decoder over whole images: float32 in and out."""
    half = in_bfloat16(network)
    return lambda x: half(x.to(torch.bfloat16, memory_format=torch.channels_last)).float()
