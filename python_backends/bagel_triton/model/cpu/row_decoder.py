"""The decoder on a CPU: whole images, channels last, and convolved some rows at a time.

Half of the plain decoder's time goes to the operating system, which maps and clears the memory of each map of the full
resolution anew, and to oneDNN, which reorders each map before and after a convolution. Channels last needs no
reordering. Norms, activations and residuals of a few rows stay in the core's cache, and a residual block makes one map
or two in place of six. The results differ from the plain module's by the rounding of sums. An encoder's may not: what
the transformer makes of them would be ten times as far apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bagel_triton.model.autoencoder import GROUPS, AttentionBlock, Decoder, Middle, Resample, ResnetBlock
from bagel_triton.model.cpu.strip_decoder import ROWS, Statistics, convolve_rows

NUMBERS = 1 << 20  # of the rows that are computed at a time: more leave the cache, fewer wait more often for threads
Prepare = Callable[[Tensor], Tensor]


def decode_by_rows(decoder: Decoder, z: Tensor) -> Tensor:
    """Run ``decoder``: z [batch, latent_channels, height, width] -> [batch, 3, 8 * height, 8 * width]."""
    x = _convolved(decoder.conv_in, z.contiguous(memory_format=torch.channels_last))
    x = _middle(decoder.mid, x)
    for level in reversed(decoder.up):
        for block in level.block:  # type: ignore[union-attr]
            x = _resnet(block, x)
        if level.upsample is not None:
            x = _doubled(level.upsample, x)  # type: ignore[arg-type]
    return _convolved(decoder.conv_out, x, _activation(decoder.norm_out, x))


def _middle(middle: Middle, x: Tensor) -> Tensor:
    return _resnet(middle.block_2, _attended(middle.attn_1, _resnet(middle.block_1, x)))


def _attended(block: AttentionBlock, x: Tensor) -> Tensor:
    """In place of ``x``."""
    scale, shift = _statistics(x).affine(block.norm)
    h = torch.addcmul(shift, x, scale)
    return x.add_(block.attend(h, h))


def _resnet(block: ResnetBlock, x: Tensor) -> Tensor:
    """In place of ``x`` where the block does not change the number of channels."""
    hidden = _convolved(block.conv1, x, _activation(block.norm1, x))
    out = x if block.nin_shortcut is None else block.nin_shortcut(x)
    for rows, product in _products(block.conv2, hidden, _activation(block.norm2, hidden)):
        out[:, :, rows].add_(product)
        del product  # before the next is computed
    return out


def _convolved(conv: nn.Conv2d, x: Tensor, prepare: Prepare | None = None) -> Tensor:
    out = _empty(x, conv.out_channels, *x.shape[2:])
    for rows, product in _products(conv, x, prepare):
        out[:, :, rows] = product
        del product  # likewise
    return out


def _products(conv: nn.Conv2d, x: Tensor, prepare: Prepare | None) -> Iterator[tuple[slice, Tensor]]:
    """A 3x3 convolution of ``x`` after ``prepare``: rows, and what they are."""
    for rows in _parts(x, max(conv.in_channels, conv.out_channels)):
        above, below = min(rows.start, 1), min(x.shape[2] - rows.stop, 1)
        framed = x[:, :, rows.start - above : rows.stop + below]
        yield rows, convolve_rows(conv, framed if prepare is None else prepare(framed), above, below)


def _doubled(resample: Resample, x: Tensor) -> Tensor:
    _, channels, height, width = x.shape
    out = _empty(x, channels, 2 * height, 2 * width)
    for rows in _parts(out, channels):
        first, last = rows.start // 2, rows.stop // 2
        above, below = min(first, 1), min(height - last, 1)
        framed = F.interpolate(x[:, :, first - above : last + below], scale_factor=2.0, mode="nearest")
        # A neighbouring row is doubled too; the convolution reaches the nearer copy only.
        framed = framed[:, :, above : framed.shape[2] - below]
        out[:, :, rows] = convolve_rows(resample.conv, framed, above, below)
    return out


def _parts(x: Tensor, channels: int) -> Iterator[slice]:
    height, width = x.shape[2:]
    step = rows_at_once(channels, width)
    return (slice(start, min(start + step, height)) for start in range(0, height, step))


def rows_at_once(channels: int, width: int) -> int:
    """Rows of a map that are computed at a time, an even number."""
    return max(NUMBERS // (channels * width), ROWS) // 2 * 2


def _empty(x: Tensor, channels: int, height: int, width: int) -> Tensor:
    return torch.empty(len(x), channels, height, width, dtype=x.dtype, memory_format=torch.channels_last)


def _pixels(x: Tensor) -> Tensor:
    """[batch, channels, height, width] -> [batch, pixels, channels]."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def _activation(norm: nn.GroupNorm, x: Tensor) -> Prepare:
    """``norm`` by the statistics of ``x``, and SiLU."""
    scale, shift = _statistics(x).affine(norm)
    return lambda rows: F.silu(torch.addcmul(shift, rows, scale), inplace=True)


def _statistics(x: Tensor) -> Statistics:
    first, *others = (_part_statistics(x[:, :, rows]) for rows in _parts(x, x.shape[1]))
    for other in others:
        first = first.with_more(other)
    return first


def _part_statistics(rows: Tensor) -> Statistics:
    """One pass of torch's batch norm an image, each channel's about its own mean."""
    images = [torch.batch_norm_update_stats(image, None, None, 0.0) for image in _pixels(rows)]
    mean, variance = (
        torch.stack(each).double().unflatten(1, (GROUPS, -1)) for each in zip(*images, strict=True)
    )  # [batch, groups, channels of one]
    whole = mean.mean(dim=2)
    size = rows[0].numel() // GROUPS
    squares = (variance + (mean - whole[:, :, None]) ** 2).mean(dim=2) * size
    return Statistics(size, whole, squares)
