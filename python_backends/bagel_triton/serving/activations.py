"""Estimates of what one forward, one decoded or encoded image holds at its peak, beside weights and contexts.

``tests/unit/test_memory_activations.py`` holds them to what torch allocates, ``python -m bench.memory_plan`` to what
processes take.
"""

from __future__ import annotations

import torch
from torch import nn

from bagel_triton.model.autoencoder import Decoder, Encoder
from bagel_triton.model.config import LanguageConfig
from bagel_triton.model.cpu import attention
from bagel_triton.model.cpu import strip_decoder as strips
from bagel_triton.model.cpu.executor import tile_rows
from bagel_triton.model.cpu.row_decoder import rows_at_once
from bagel_triton.model.cpu.row_stable import CACHED, ONEDNN_ROWS, WEIGHTS, compiles_all, onednn_pieces, takes_onednn
from bagel_triton.model.device import Placement
from bagel_triton.model.quantization import INT8_ROWS, Form


def forward_bytes(
    config: LanguageConfig,
    tokens: int,
    placement: Placement,
    threads: int = 1,
    form: Form | None = None,
    span: int | None = None,
) -> int:
    """Activations of one packed forward at their peak with weights in ``form``, on all ``threads`` of a CPU.

    On a GPU that is inside a feed-forward. A token has its embedding, three vectors of the inner width, what its heads
    found, key, value and rotary tables, and four more of the hidden size: a layer's input, the residual, that normed,
    and the output. A quantised weight is decoded whole, or sums of integers are held.

    Args:
        span: the most tokens of one sequence that see each other, of an image; None for all.
    """
    if placement.torch_device.type == "cpu":
        return _cpu_forward_bytes(config, tokens, placement, threads, form, tokens if span is None else span)
    itemsize, hidden, inner = placement.torch_dtype.itemsize, config.hidden_size, config.intermediate_size
    heads = (config.num_heads + config.num_kv_heads * 2 + 2) * config.head_dim
    forward = tokens * (5 * hidden + 3 * inner + heads) * itemsize
    if form is None:
        return forward
    if form.activations:
        return forward + (2 * INT8_ROWS * 2 * inner * torch.float32.itemsize if form.storage == "int8" else 0)
    return forward + 2 * inner * hidden * itemsize


def _cpu_forward_bytes(
    config: LanguageConfig, tokens: int, placement: Placement, threads: int, form: Form | None, span: int
) -> int:
    """A token has its embedding, residual, query, what its heads found, key, value and rotary tables.

    Beside these are the tiles of rows that the threads are at, or the scratch memory of their attention.
    """
    dtype, hidden, inner = placement.torch_dtype, config.hidden_size, config.intermediate_size
    query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    held = tokens * 2 * (hidden + query + key + config.head_dim) * dtype.itemsize
    tile = tile_rows(tokens, threads, takes_onednn(dtype))
    rows = min(tokens, tile * threads)

    def product(width: int, out: int) -> int:
        return product_bytes(width, out, rows, placement, threads, form)

    if compiles_all(dtype):
        # A product of plain weights is oneDNN's own result, of one piece or, before they are put together, one more.
        pieces = [size for _, size in onednn_pieces(min(tokens, tile))]
        apart = max(pieces) * min(threads, -(-tokens // tile)) if len(pieces) > 1 else 0

        def result(width: int, out: int) -> int:
            return rows * out * dtype.itemsize + (apart * out * dtype.itemsize if form is None else product(width, out))

        projecting, activating = result(hidden, query + 2 * key), result(hidden, 2 * inner)
        active = rows * inner * dtype.itemsize
        most = max(projecting, activating, 3 * active, active + product(inner, hidden))
        tiles = rows * hidden * dtype.itemsize + most
        return held + max(tiles, threads * _attention_bytes(config, span))
    # Two vectors of the inner width and a normed one; and then the most of three: copies in float32 while they are
    # normed in another dtype, a feed-forward's products, or a layer's queries and keys before they are in their places.
    spare = min(rows * inner, CACHED * threads) * dtype.itemsize  # of an activation function
    copies = 0 if dtype == torch.float32 else rows * 2 * torch.float32.itemsize
    keys = rows * key * dtype.itemsize + max(copies * key, product(hidden, key))
    queries = rows * query * dtype.itemsize + max(copies * query, product(hidden, query), keys)
    most = max(copies * hidden, spare, product(hidden, inner), product(inner, hidden), queries)
    tiles = rows * hidden * dtype.itemsize + most
    attending = _torch_attention_bytes(config, span, threads, dtype.itemsize)
    return held + rows * 2 * inner * dtype.itemsize + max(tiles, attending)


def _torch_attention_bytes(config: LanguageConfig, span: int, threads: int, itemsize: int) -> int:
    """What torch's attention gives ``threads`` that take the heads of a key head, or a head, each; and its blocks."""
    share = 1 if config.num_kv_heads % threads else config.num_heads // config.num_kv_heads
    heads = config.num_heads if threads == 1 else min(threads * share, config.num_heads)
    queries = 256 if span >= 768 else 64 if span >= 192 else 32
    block = queries * (512 + config.head_dim) * torch.float32.itemsize  # scores of 512 keys, and what they give
    return heads * span * config.head_dim * itemsize + threads * block


def generated_bytes(config: LanguageConfig, dtype: torch.dtype, span: int) -> int:
    """Code that oneDNN generates while a CPU denoises images of ``span`` tokens, for every shape, and keeps."""
    linear = 4 * len(ONEDNN_ROWS) if takes_onednn(dtype) else 0  # of a layer, for each number of rows
    pieces = {size for _, size in onednn_pieces(_attention_rows(config, span), attention.ROWS)}
    products = 2 * USUAL_BLOCKS * len(pieces) if compiles_all(dtype) else 0
    return (linear + products) * CODE_BYTES


def _attention_rows(config: LanguageConfig, span: int) -> int:
    """Rows of all heads that a thread takes at once in :mod:`bagel_triton.model.cpu.attention`."""
    share = config.num_heads // config.num_kv_heads
    return min(span * max(min(attention.MAX_PART_ROWS // span, share), 1), attention.MAX_PART_ROWS)


def _attention_bytes(config: LanguageConfig, span: int) -> int:
    """Scratch memory of such a thread."""
    sizes = [size for _, size in onednn_pieces(_attention_rows(config, span), attention.ROWS)]
    # Queries and what they found; of a block its keys, its values twice, the scores and what they give.
    block = attention.BLOCK_KEYS * (3 * config.head_dim + max(sizes)) + max(sizes) * config.head_dim
    return (2 * sum(sizes) * config.head_dim + block) * torch.float32.itemsize


CODE_BYTES = 600 << 10  # that oneDNN keeps for a shape
USUAL_BLOCKS = 6  # numbers of keys that a block of the attention has, of images of a few sizes
DECODER_CODE = 10 * CODE_BYTES  # of its convolutions, as measured
PACKED = 256  # inputs of a weight
DECODED = {"int8": 4, "fp8": 8, "int4": 6, "nf4": 6}  # bytes of a weight while it is decoded in float32


def product_bytes(width: int, out: int, rows: int, placement: Placement, threads: int, form: Form | None) -> int:
    """Memory of a product on a CPU beside its operands and result, [rows, width] times [width, out] on all ``threads``.

    In bfloat16 a CPU without instructions for it sums into float32, all of a product. A quantised weight is decoded a
    few rows at a time, and what they give is held before it is put in its place.
    """
    dtype, wide = placement.torch_dtype, torch.float32.itemsize
    itemsize = dtype.itemsize
    sums = 0 if dtype == torch.float32 or torch.cpu._is_avx512_bf16_supported() else wide

    if form is None:  # without instructions oneDNN copies that much of a weight, outside of torch's own count
        piece = min(rows, ONEDNN_ROWS[0] * threads) * itemsize if takes_onednn(dtype) else 0  # before it is copied
        return rows * out * sums + (threads * PACKED * out * itemsize if sums else 0) + piece * out
    part = min(out, max(WEIGHTS // width, 16))
    decoding = threads * part * width * DECODED[form.storage]
    if not form.activations:
        rounded = threads * part * width * (wide + itemsize if itemsize != wide else 0)
        held = rows * part * (itemsize + sums)
        return max(decoding, rounded, held + threads * part * width * itemsize)
    last = rows * part * wide if part < out else 0  # of the rows before, until the next are there
    if form.storage == "int8":  # in float32 and between two roundings; then sums of integers, and those in float32
        rounding = rows * width * (2 * wide if itemsize != wide else wide + 1)
        return max(rounding, rows * width + rows * part * 2 * wide + last)
    rounded = rows * part * itemsize if itemsize != wide else 0
    given = rows * part * wide + rounded
    multiplying = max(decoding, given + threads * part * width * wide)
    return max(rows * width * (2 * wide + 1), rows * width * wide + last + multiplying)


def decode_bytes(
    decoder: Decoder, height: int, width: int, tiled: bool = False, on_gpu: bool = False, ranks: int = 1
) -> int:
    """Activations of decoding one image at their peak, in the last level, on all ``ranks``.

    Whole on a GPU that is in a norm of that level: a map in bfloat16, and two in float32. On a CPU a block holds what
    it takes and the two maps that it makes, or two where it adds to the first, and some rows around a convolution.

    In strips that is the map a block takes or the two it makes, as the one goes while the others come, and
    what one strip needs, on each rank.
    """
    first: nn.Conv2d = decoder.up[0].block[0].conv1  # type: ignore[index, union-attr]
    channels_in, channels_out = first.in_channels, first.out_channels
    if ranks == 1 and (not tiled or height * width <= strips.WORTH_IT):
        if on_gpu:
            wide, narrow = torch.float32.itemsize, torch.bfloat16.itemsize
            return max(channels_in, channels_out) * (2 * wide + narrow) * height * width
        return _whole_bytes(first, height, width)
    whole = max(channels_in, 2 * channels_out) * height
    strip = 8 * channels_in * (strips.ROWS + 2)  # where a strip is doubled
    return (whole + ranks * strip) * width * torch.float32.itemsize


def encode_bytes(encoder: Encoder, height: int, width: int) -> int:
    """Activations of encoding one image at their peak, in a convolution of the first level or before it."""
    channels = max(_level_channels(encoder.down[0]), 2 * encoder.conv_in.out_channels)
    return channels * height * width * torch.float32.itemsize


def _whole_bytes(conv: nn.Conv2d, height: int, width: int) -> int:
    """Maps at the peak on a CPU, in the block of the full resolution whose first convolution ``conv`` is."""
    channels_in, channels_out = conv.in_channels, conv.out_channels

    def rows(taken: int) -> int:  # activated ones, and the same padded or what a convolution makes of them
        at_once = rows_at_once(max(taken, channels_out), width)
        return (taken + max(taken, channels_out)) * (min(at_once, height) + 2)

    # Before it a map of half the size is doubled: some rows, the same padded, and what a convolution makes of them.
    doubled = min(rows_at_once(channels_in, width), height)
    doubling = (channels_in + channels_in // 4) * height + 3 * channels_in * doubled
    second = (channels_out if channels_in == channels_out else channels_in + channels_out) + channels_out
    first = (channels_in + channels_out) * height + rows(channels_in)
    peak = max(doubling, first, second * height + rows(channels_out))
    return peak * width * torch.float32.itemsize


def _level_channels(level: nn.Module) -> int:
    """Full-resolution channels that are held at most: what the blocks so far made, and a convolution's copies."""
    blocks: nn.ModuleList = level.block  # type: ignore[assignment]
    if not len(blocks):
        return 0
    first: nn.Conv2d = blocks[0].conv1  # type: ignore[assignment]
    channels_in, channels_out = first.in_channels, first.out_channels
    earlier = channels_in if len(blocks) > 1 else 0
    return max(2 * channels_in + channels_out + max(channels_in, channels_out), earlier + 5 * channels_out)
