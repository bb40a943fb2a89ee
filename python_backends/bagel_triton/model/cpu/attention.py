"""Attention of many rows for processors on which torch's own takes slow products.

The keys are taken a block at a time, with a running maximum and sum (the online softmax of FlashAttention, Dao et al.
2022): two oneDNN products around a compiled softmax, in scratch memory that stays in the core's cache.
"""

from __future__ import annotations

import math
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from bagel_triton.model.attention import attend
from bagel_triton.model.cpu.row_stable import few_rows_kernels, onednn_pieces, onednn_product, takes_onednn

MIN_ROWS = 64  # fewer are not worth the copies of keys and values
ROWS = 1024, 256, 64, 16  # of a product; large ones, as oneDNN copies the keys and values for each
MAX_PART_ROWS = 8192  # of all heads at once, for which there is scratch memory
BLOCK_KEYS = 768  # at most
KEY_STEP = 64  # blocks are multiples: oneDNN keeps code for every number of keys that it meets


def attend_many(query: Tensor, key: Tensor, value: Tensor, causal: bool, out: Tensor) -> None:
    """:func:`bagel_triton.model.attention.attend` into ``out``, faster where oneDNN's products are.

    Which of the two a row takes depends on its span alone, and no row on those beside it.
    """
    kernels, rows = few_rows_kernels(query.dtype), len(query)
    if causal or rows < MIN_ROWS or kernels is None or not takes_onednn(query.dtype):
        out.copy_(attend(query, key, value, causal))
        return
    share = query.shape[1] // key.shape[1]
    together = max(min(MAX_PART_ROWS // rows, share), 1)  # heads with the same keys share the copies made of these
    for kv_head in range(key.shape[1]):
        for head in range(kv_head * share, (kv_head + 1) * share, together):
            heads = slice(head, min(head + together, (kv_head + 1) * share))
            for first in range(0, rows, MAX_PART_ROWS):
                part = slice(first, first + MAX_PART_ROWS), heads
                _attend_heads(query[part], key[:, kv_head], value[:, kv_head], kernels, out[part])


def _attend_heads(query: Tensor, key: Tensor, value: Tensor, kernels: ModuleType, out: Tensor) -> None:
    """query and out [rows, heads, head_dim], key and value [length, head_dim] of all heads."""
    tokens, heads, size = query.shape
    pieces = [slice(start, start + count) for start, count in onednn_pieces(tokens * heads, ROWS)]
    rows, padded = tokens * heads, pieces[-1].stop
    scaled = query.new_empty(padded, size)  # a head's rows after another's
    scaled[rows:] = 0.0
    by_head = scaled[:rows].unflatten(0, (heads, tokens))
    torch.mul(query.transpose(0, 1), math.log2(math.e) / math.sqrt(size), out=by_head)
    found, shrink = torch.empty_like(scaled), query.new_empty(padded)
    largest, total = query.new_full((padded,), -torch.inf), query.new_zeros(padded)
    parts = [[whole[piece] for whole in (scaled, found, largest, total, shrink)] for piece in pieces]
    blocks = -(-len(key) // BLOCK_KEYS)
    step = -(-len(key) // (blocks * KEY_STEP)) * KEY_STEP
    for first in range(0, len(key), step):
        keys, values = key[first : first + step], value[first : first + step]
        count = len(keys)
        padding = 0, 0, 0, -count % KEY_STEP
        keys, values = (F.pad(whole, padding).contiguous() for whole in (keys, values))
        for queries, place, *sums in parts:
            weights = onednn_product(queries, keys)  # [rows, keys]: the scores
            kernels.softmax_block(weights, count, *sums)
            more = onednn_product(weights, values.t())
            _ = torch.addcmul(more, place, sums[2][:, None], out=place) if first else place.copy_(more)
            del weights, more  # before the next are computed
    by_head, sizes = found[:rows].view(heads, tokens, size), total[:rows].view(heads, tokens, 1)
    torch.div(by_head, sizes, out=out.transpose(0, 1))
