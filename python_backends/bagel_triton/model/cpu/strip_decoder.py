"""The decoder in strips: the same image in a fraction of the memory.

The plain decoder holds several feature maps of the full resolution. Here each map is a queue of
strips of rows. A convolution takes a strip, with one row of each neighbour, and makes a strip of
the next map; a strip is freed once the one below it is done. So no two maps exist in full at
the same time. Group norms use the statistics of the whole map, which are summed up as its
strips are made. There are no seams to blend, and the image differs by the rounding of sums only.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bagel_triton.model.autoencoder import GROUPS, Decoder, Resample, ResnetBlock

ROWS = 32  # of a strip
WORTH_IT = 512 * 512  # larger images are decoded in strips, pixels


class Strips:
    """A feature map in strips [batch, channels, rows, width], top to bottom, and the statistics of its groups."""

    def __init__(self) -> None:
        self._strips: deque[Tensor] = deque()
        self._count = 0
        self._mean = self._squares = torch.zeros(())  # [batch, GROUPS] float64; squared distances from the mean

    @classmethod
    def of(cls, whole: Tensor) -> Strips:
        """Cut ``whole`` [batch, channels, height, width]."""
        strips = cls()
        strips.append(whole)
        return strips

    def append(self, rows: Tensor) -> None:
        """Add rows below."""
        for strip in rows.split(ROWS, dim=2):
            # A copy, as a view would keep all of ``rows``.
            self._strips.append(strip.clone(memory_format=torch.contiguous_format))
            self._observe(self._strips[-1])

    def _observe(self, strip: Tensor) -> None:
        groups = strip.view(len(strip), GROUPS, -1)
        center = groups.mean(dim=-1, keepdim=True)  # torch's variance takes several times as long
        squares = torch.linalg.vector_norm(groups - center, dim=-1).double() ** 2
        mean, count = center.squeeze(-1).double(), groups.shape[-1]
        if not self._count:
            self._mean = self._squares = torch.zeros((), dtype=mean.dtype, device=mean.device)
        total, apart = self._count + count, mean - self._mean
        self._squares = self._squares + squares + apart**2 * (self._count * count / total)
        self._mean, self._count = self._mean + apart * (count / total), total

    def activation(self, norm: nn.GroupNorm) -> Callable[[Tensor], Tensor]:
        """A function that applies ``norm``, with the statistics of the strips so far, and SiLU."""
        deviation = (self._squares / self._count + norm.eps).rsqrt()
        per_channel = norm.num_channels // GROUPS
        mean, inverse = (part.repeat_interleave(per_channel, dim=1) for part in (self._mean, deviation))
        scale = inverse * norm.weight.double()
        shift = norm.bias.double() - mean * scale
        scale, shift = (part.to(norm.weight.dtype)[:, :, None, None] for part in (scale, shift))
        return lambda x: F.silu(torch.addcmul(shift, x, scale), inplace=True)

    def take(self) -> Iterator[Tensor]:
        """Remove and return each strip."""
        while self._strips:
            yield self._strips.popleft()

    def take_framed(self) -> Iterator[tuple[Tensor, int, int]]:
        """Remove and return each strip with the rows next to it, and the number of those above and below (0 or 1)."""
        above: list[Tensor] = []
        while self._strips:
            strip = self._strips.popleft()
            below = [self._strips[0][:, :, :1]] if self._strips else []
            yield torch.cat((*above, strip, *below), dim=2), len(above), len(below)
            above = [strip[:, :, -1:].clone()]


def decode_in_strips(decoder: Decoder, z: Tensor) -> Tensor:
    """Run ``decoder``: z [batch, latent_channels, height, width] -> [batch, 3, 8 * height, 8 * width]."""
    strips = Strips.of(decoder.mid(decoder.conv_in(z)))
    for level in reversed(decoder.up):
        for block in level.block:  # type: ignore[union-attr]
            strips = _resnet(block, strips)
        if level.upsample is not None:
            strips = _doubled(level.upsample, strips)  # type: ignore[arg-type]
    activate = strips.activation(decoder.norm_out)
    return torch.cat(list(_convolved(decoder.conv_out, strips, activate)), dim=2)


def _convolved(conv: nn.Conv2d, strips: Strips, activate: Callable[[Tensor], Tensor]) -> Iterator[Tensor]:
    """A 3x3 convolution of an activated map, strip by strip."""
    for framed, above, below in strips.take_framed():
        yield _conv(conv, activate(framed), above, below)


def _conv(conv: nn.Conv2d, rows: Tensor, above: int, below: int) -> Tensor:
    """``conv``, 3x3, of ``rows``, which include ``above`` and ``below`` neighbouring rows; zeros beyond the image."""
    return F.conv2d(F.pad(rows, (0, 0, 1 - above, 1 - below)), conv.weight, conv.bias, padding=(0, 1))


def _resnet(block: ResnetBlock, x: Strips) -> Strips:
    hidden, through, out = Strips(), deque[Tensor](), Strips()
    activate = x.activation(block.norm1)
    for framed, above, below in x.take_framed():
        strip = framed[:, :, above : framed.shape[2] - below]
        through.append(strip.clone() if block.nin_shortcut is None else block.nin_shortcut(strip))
        hidden.append(_conv(block.conv1, activate(framed), above, below))
    for strip in _convolved(block.conv2, hidden, hidden.activation(block.norm2)):
        out.append(strip.add_(through.popleft()))
    return out


def _doubled(resample: Resample, x: Strips) -> Strips:
    out = Strips()
    for framed, above, below in x.take_framed():
        rows = F.interpolate(framed, scale_factor=2.0, mode="nearest")
        # A neighbouring row is doubled too; the convolution reaches the nearer copy only.
        out.append(_conv(resample.conv, rows[:, :, above : rows.shape[2] - below], above, below))
    return out
