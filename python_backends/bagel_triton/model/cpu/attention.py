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
BLOCK_KEYS = 1024
KEY_STEP = 64  # the last block is padded to a multiple: oneDNN keeps code for every number of keys that it meets


def attend_many(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Tensor:
    """:func:`bagel_triton.model.attention.attend`, faster where oneDNN's products are.

    Which of the two a row takes depends on its span alone, and no row on those beside it.
    """
    kernels = few_rows_kernels(query.dtype)
    if causal or len(query) < MIN_ROWS or kernels is None or not takes_onednn(query):
        return attend(query, key, value, causal)
    out = torch.empty_like(query)
    group = query.shape[1] // key.shape[1]
    for kv_head in range(key.shape[1]):
        heads = slice(kv_head * group, (kv_head + 1) * group)
        rows = query[:, heads].transpose(0, 1).flatten(0, 1)  # [group * rows, head_dim]
        attended = _attend_head(rows, key[:, kv_head], value[:, kv_head], kernels)
        out[:, heads] = attended.unflatten(0, (group, -1)).transpose(0, 1)
    return out


def _attend_head(query: Tensor, key: Tensor, value: Tensor, kernels: ModuleType) -> Tensor:
    """query [rows, head_dim], key and value [length, head_dim] -> [rows, head_dim]."""
    rows, size = query.shape
    pieces = [slice(start, start + count) for start, count in onednn_pieces(rows)]
    padded = pieces[-1].stop
    query = F.pad(query, (0, 0, 0, padded - rows)) * (math.log2(math.e) / math.sqrt(size))
    out, shrink = torch.empty_like(query), query.new_empty(padded)
    largest, total = query.new_full((padded,), -torch.inf), query.new_zeros(padded)
    for first in range(0, len(key), BLOCK_KEYS):
        keys, values = key[first : first + BLOCK_KEYS], value[first : first + BLOCK_KEYS]
        count = len(keys)
        padding = 0, 0, 0, -count % KEY_STEP
        keys, values = F.pad(keys, padding).contiguous(), F.pad(values, padding).t().contiguous()
        for piece in pieces:
            weights = onednn_product(query[piece], keys)  # [rows, keys]: the scores
            kernels.softmax_block(weights, count, largest[piece], total[piece], shrink[piece])
            found, place = onednn_product(weights, values), out[piece]
            _ = place.mul_(shrink[piece, None]).add_(found) if first else place.copy_(found)
    return out[:rows].div_(total[:rows, None])
