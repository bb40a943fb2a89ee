"""Attention of many rows by two plain products, for processors on which torch's own attention takes slow ones."""

from __future__ import annotations

import torch
from torch import Tensor

from bagel_triton.model.attention import attend
from bagel_triton.model.cpu.row_stable import onednn_linear, takes_onednn

MIN_ROWS = 64  # fewer are not worth the copies of keys and values
BLOCK_ROWS = 64, 256  # the least and the most at a time
BLOCK_SCORES = 1 << 17  # which stay in the second cache


def attend_span(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Tensor:
    """:func:`bagel_triton.model.attention.attend`, faster where oneDNN's products are the faster ones.

    Which of the two a row takes depends on its span alone.
    """
    if causal or len(query) < MIN_ROWS or not takes_onednn(query):
        return attend(query, key, value, causal)
    out = torch.empty_like(query)
    kv_heads = key.shape[1]
    group, factor = query.shape[1] // kv_heads, query.shape[2] ** -0.5
    step = min(max(BLOCK_SCORES // len(key), BLOCK_ROWS[0]), BLOCK_ROWS[1])
    for kv_head in range(kv_heads):
        keys = key[:, kv_head] * factor  # [length, head_dim]
        values = value[:, kv_head].t().contiguous()  # [head_dim, length]
        for head in range(kv_head * group, (kv_head + 1) * group):
            for start in range(0, len(query), step):
                rows = slice(start, start + step)
                scores = onednn_linear(query[rows, head].contiguous(), keys)
                out[rows, head] = onednn_linear(scores.softmax(dim=-1), values)
    return out
