"""Attention of packed queries over keys that a store holds, behind one function."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Span:
    """Rows ``start:stop`` of a pack that attend to all keys of one sequence.

    With ``causal`` the rows are the sequence's last tokens and each sees no later one;
    otherwise every row sees every key, the pack's own included.
    """

    start: int
    stop: int
    sequence: int
    causal: bool


class StepKV(Protocol):
    """Where one forward writes its keys and values, and reads each sequence's."""

    def write(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Store the pack's new keys and values, [tokens, kv_heads, head_dim]."""

    def read(self, layer: int, sequence: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a sequence, past and new: [length, kv_heads, head_dim] each."""


def backend_name(device: torch.device, dtype: torch.dtype) -> str:
    """``flash-attn`` where it can run (CUDA, half precision, importable), else ``torch-sdpa``."""
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16) and importlib.util.find_spec("flash_attn"):
        return "flash-attn"
    return "torch-sdpa"


def attend(query: Tensor, layer: int, spans: Sequence[Span], kv: StepKV) -> Tensor:
    """Attention for every span of a pack.

    Args:
        query: [tokens, heads, head_dim], after norm and RoPE.

    Returns:
        [tokens, heads * head_dim].
    """
    flash = backend_name(query.device, query.dtype) == "flash-attn"
    one_span = _flash_attention if flash else _sdpa_attention
    out = torch.empty_like(query)
    for span in spans:
        key, value = kv.read(layer, span.sequence)
        out[span.start : span.stop] = one_span(query[span.start : span.stop], key, value, span.causal)
    return out.flatten(1)


def _sdpa_attention(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Tensor:
    rows, length = query.shape[0], key.shape[0]
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))  # [1, heads, tokens, head_dim]
    mask = None
    if causal and 1 < rows < length:
        # torch's is_causal aligns the first row with the first key; here the last ones meet.
        mask = torch.ones(rows, length, dtype=torch.bool, device=query.device).tril(length - rows)
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal and rows == length, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.squeeze(0).transpose(0, 1)  # [rows, heads, head_dim]


def _flash_attention(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Tensor:
    from flash_attn import flash_attn_func  # GPU only, hence optional

    out: Tensor = flash_attn_func(query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0), causal=causal)
    return out.squeeze(0)
