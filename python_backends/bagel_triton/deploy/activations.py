"""The memory that a stage's computing takes at its peak, by the geometry alone: estimates."""

from __future__ import annotations

import torch
from torch import nn

from bagel_triton.model import strips
from bagel_triton.model.autoencoder import Decoder, Encoder
from bagel_triton.model.config import LanguageConfig
from bagel_triton.model.linear import CACHED
from bagel_triton.model.pack import block_rows
from bagel_triton.model.placement import Placement


def forward_bytes(config: LanguageConfig, tokens: int, placement: Placement, threads: int = 1) -> int:
    """Activations of one packed forward at their peak, inside a feed-forward.

    A token has its embedding, residual, query, what that attended to, key, value and rotary
    tables. The rows of a block for each of ``threads``, which is all rows where there is a GPU,
    have two vectors of the inner width and a normed one besides; while it is normed, two copies in
    float32 where it is of another type.
    """
    itemsize, on_cpu = placement.torch_dtype.itemsize, placement.torch_device.type == "cpu"
    heads = 2 * (config.num_heads + config.num_kv_heads + 1) * config.head_dim
    rows = min(tokens, block_rows(tokens, threads) * threads) if on_cpu else tokens
    copies = 0 if placement.torch_dtype == torch.float32 else 2 * torch.float32.itemsize
    inner = rows * (2 * config.intermediate_size * itemsize + config.hidden_size * max(itemsize, copies))
    spare = min(rows * config.intermediate_size, CACHED * threads) * itemsize if on_cpu else 0
    return tokens * (2 * config.hidden_size + heads) * itemsize + inner + spare


def decode_bytes(decoder: Decoder, height: int, width: int, tiled: bool = False) -> int:
    """Activations of decoding one picture at their peak, in a convolution of the last level.

    In strips that is the map a block takes or the two it makes, as the one goes while the others come, and
    what one strip needs.
    """
    if not tiled or height * width <= strips.WORTH_IT:
        return _level_channels(decoder.up[0]) * height * width * torch.float32.itemsize
    first: nn.Conv2d = decoder.up[0].block[0].conv1  # type: ignore[index, union-attr]
    channels_in, channels_out = first.in_channels, first.out_channels
    whole = max(channels_in, 2 * channels_out) * height
    strip = 8 * channels_in * (strips.ROWS + 2)  # where a strip is doubled
    return (whole + strip) * width * torch.float32.itemsize


def encode_bytes(encoder: Encoder, height: int, width: int) -> int:
    """Activations of encoding one picture at their peak, in a convolution of the first level."""
    return _level_channels(encoder.down[0]) * height * width * torch.float32.itemsize


def _level_channels(level: nn.Module) -> int:
    """Full-resolution channels that are held at most: what the blocks so far made, and a convolution's copies."""
    blocks: nn.ModuleList = level.block  # type: ignore[assignment]
    first: nn.Conv2d = blocks[0].conv1  # type: ignore[assignment]
    channels_in, channels_out = first.in_channels, first.out_channels
    earlier = channels_in if len(blocks) > 1 else 0
    return max(2 * channels_in + channels_out + max(channels_in, channels_out), earlier + 5 * channels_out)
