"""The decoder in strips: the same image in a fraction of the memory.

The plain decoder holds several feature maps of the full resolution. Here each map is a queue of
strips of rows. A convolution takes a strip, with one row of each neighbour, and makes a strip of
the next map; a strip is freed once the one below it is done. So no two maps exist in full at
the same time. Group norms use the statistics of the whole map, which are summed up as its
strips are made. There are no seams to blend, and the image differs by the rounding of sums only.

Several ranks may have some rows of an image each. The rows next to a rank's own, the statistics of a map, and
for the attention the whole map then come from the other ranks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bagel_triton.model.autoencoder import GROUPS, AttentionBlock, Decoder, Resample, ResnetBlock

ROWS = 32  # of a strip
WORTH_IT = 512 * 512  # larger images are decoded in strips, pixels


class Others(Protocol):
    """The ranks that have the other rows of an image; all ranks call the methods in the same order."""

    def rows(self, height: int) -> slice:
        """This rank's rows of a latent image of ``height`` rows."""

    def edges(self, first: Tensor, last: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The rows above this rank's ``first`` one and below its ``last``; None beyond the image."""

    def all_of(self, own: Tensor) -> list[Tensor]:
        """Gather the tensor ``own`` of every rank, all of one shape, in the order of the ranks."""

    def whole(self, own: Tensor, height: int) -> Tensor:
        """The map of ``height`` rows, of which ``own`` [batch, channels, rows, width] are this rank's."""


class Statistics(NamedTuple):
    """Of ``size`` values of each group: [batch, GROUPS] float64; ``squares`` are summed distances from the mean.

    The sizes of other ranks' groups come as a tensor, which the host does not wait for.
    """

    size: float | Tensor
    mean: Tensor
    squares: Tensor

    def with_more(self, other: Statistics) -> Statistics:
        """Of both together."""
        total, apart = self.size + other.size, other.mean - self.mean
        squares = self.squares + other.squares + apart**2 * (self.size * other.size / total)
        return Statistics(total, self.mean + apart * (other.size / total), squares)

    def affine(self, norm: nn.GroupNorm) -> tuple[Tensor, Tensor]:
        """What ``norm`` multiplies a map with these statistics by, and adds to it: [batch, channels, 1, 1] each."""
        deviation = (self.squares / self.size + norm.eps).rsqrt()
        per_channel = norm.num_channels // GROUPS
        mean, inverse = (part.repeat_interleave(per_channel, dim=1) for part in (self.mean, deviation))
        scale = inverse * norm.weight.double()
        shift = norm.bias.double() - mean * scale
        scale, shift = (part.to(norm.weight.dtype)[:, :, None, None] for part in (scale, shift))
        return scale, shift


class Strips:
    """A feature map in strips [batch, channels, rows, width], top to bottom, and the statistics of its groups.

    With ``others`` it is this rank's rows of a map.
    """

    def __init__(self, others: Others | None = None) -> None:
        self.others = others
        self._strips: deque[Tensor] = deque()
        self._statistics: Statistics | None = None

    @classmethod
    def of(cls, rows: Tensor, others: Others | None = None) -> Strips:
        """Cut ``rows`` [batch, channels, height, width]."""
        strips = cls(others)
        strips.append(rows)
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
        new = Statistics(groups.shape[-1], center.squeeze(-1).double(), squares)
        self._statistics = new if self._statistics is None else self._statistics.with_more(new)

    def normalization(self, norm: nn.GroupNorm) -> Callable[[Tensor], Tensor]:
        """A function that applies ``norm``, with the statistics of the whole map, which is complete."""
        assert self._statistics is not None, "no map is empty"
        size, mean, squares = whole = self._statistics
        if self.others is not None:
            parts = self.others.all_of(torch.stack((torch.ones_like(mean) * size, mean, squares)))
            every = [Statistics(*part) for part in parts]
            whole = every[0]
            for part in every[1:]:
                whole = whole.with_more(part)
        scale, shift = whole.affine(norm)
        return lambda x: torch.addcmul(shift, x, scale)

    def activation(self, norm: nn.GroupNorm) -> Callable[[Tensor], Tensor]:
        """:meth:`normalization`, and SiLU."""
        normalize = self.normalization(norm)
        return lambda x: F.silu(normalize(x), inplace=True)

    def take(self) -> Iterator[Tensor]:
        """Remove and return each strip."""
        while self._strips:
            yield self._strips.popleft()

    def take_framed(self) -> Iterator[tuple[Tensor, int, int]]:
        """Remove and return each strip with the rows next to it, and the number of those above and below (0 or 1)."""
        first: Tensor | None = None
        last: Tensor | None = None
        if self.others is not None:
            first, last = self.others.edges(self._strips[0][:, :, :1], self._strips[-1][:, :, -1:])
        above = [] if first is None else [first]
        while self._strips:
            strip = self._strips.popleft()
            next_row = self._strips[0][:, :, :1] if self._strips else last
            below = [] if next_row is None else [next_row]
            yield torch.cat((*above, strip, *below), dim=2), len(above), len(below)
            above = [strip[:, :, -1:].clone()]


def decode_in_strips(decoder: Decoder, z: Tensor, others: Others | None = None) -> Tensor:
    """Run ``decoder``: z [batch, latent_channels, height, width] -> [batch, 3, 8 * height, 8 * width].

    With ``others``, which have ``z`` too, the result is this rank's rows.
    """
    strips = Strips.of(decoder.mid(decoder.conv_in(z))) if others is None else _start(decoder, z, others)
    for level in reversed(decoder.up):
        for block in level.block:  # type: ignore[union-attr]
            strips = _resnet(block, strips)
        if level.upsample is not None:
            strips = _doubled(level.upsample, strips)  # type: ignore[arg-type]
    activate = strips.activation(decoder.norm_out)
    return torch.cat(list(_convolved(decoder.conv_out, strips, activate)), dim=2)


def _start(decoder: Decoder, z: Tensor, others: Others) -> Strips:
    """This rank's rows of what the middle makes of ``z``."""
    height = z.shape[2]
    rows = others.rows(height)
    framed = z[:, :, max(rows.start - 1, 0) : rows.stop + 1]
    first = convolve_rows(decoder.conv_in, framed, min(rows.start, 1), min(height - rows.stop, 1))
    x = _resnet(decoder.mid.block_1, Strips.of(first, others))
    return _resnet(decoder.mid.block_2, _attended(decoder.mid.attn_1, x, others, height))


def _attended(block: AttentionBlock, x: Strips, others: Others, height: int) -> Strips:
    normalize = x.normalization(block.norm)
    rows = torch.cat(list(x.take()), dim=2)
    own = normalize(rows)
    return Strips.of(rows + block.attend(own, others.whole(own, height)), others)


def _convolved(conv: nn.Conv2d, strips: Strips, activate: Callable[[Tensor], Tensor]) -> Iterator[Tensor]:
    """A 3x3 convolution of an activated map, strip by strip."""
    for framed, above, below in strips.take_framed():
        yield convolve_rows(conv, activate(framed), above, below)


def convolve_rows(conv: nn.Conv2d, rows: Tensor, above: int, below: int) -> Tensor:
    """``conv``, 3x3, of ``rows``, which include ``above`` and ``below`` neighbouring rows; zeros beyond the image."""
    if above + below < 2:
        rows = F.pad(rows, (0, 0, 1 - above, 1 - below))
    return F.conv2d(rows, conv.weight, conv.bias, padding=(0, 1))


def _resnet(block: ResnetBlock, x: Strips) -> Strips:
    hidden, through, out = Strips(x.others), deque[Tensor](), Strips(x.others)
    activate = x.activation(block.norm1)
    for framed, above, below in x.take_framed():
        strip = framed[:, :, above : framed.shape[2] - below]
        through.append(strip.clone() if block.nin_shortcut is None else block.nin_shortcut(strip))
        hidden.append(convolve_rows(block.conv1, activate(framed), above, below))
    for strip in _convolved(block.conv2, hidden, hidden.activation(block.norm2)):
        out.append(strip.add_(through.popleft()))
    return out


def _doubled(resample: Resample, x: Strips) -> Strips:
    out = Strips(x.others)
    for framed, above, below in x.take_framed():
        rows = F.interpolate(framed, scale_factor=2.0, mode="nearest")
        # A neighbouring row is doubled too; the convolution reaches the nearer copy only.
        out.append(convolve_rows(resample.conv, rows[:, :, above : rows.shape[2] - below], above, below))
    return out
