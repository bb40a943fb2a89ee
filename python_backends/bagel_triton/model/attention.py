"""Attention of packed queries over keys that a store holds, behind one function."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from bagel_triton.model.cpu.thread_pool import SINGLE_THREAD, ThreadPool

OneSpan = Callable[[Tensor, Tensor, Tensor, bool], Tensor]
WORTH_SHARING = 128 * 128  # scores of a head that are worth a thread of a pool
LEAST_ROWS = 32  # fewer are not worth it however many keys there are
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class QuerySpan:
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

    def write(self, layer: int, key: Tensor, value: Tensor, rows: slice) -> None:
        """Store ``rows`` of the pack's new keys and values, [tokens, kv_heads, head_dim].

        Every row is written once, from any thread, before a sequence of the layer is read.
        """

    def rounds(self, spans: Sequence[QuerySpan]) -> Iterable[Sequence[QuerySpan]]:
        """Every span once, with those whose sequences' keys may be in use at the same time."""

    def read(self, layer: int, sequence: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a sequence, past and new: [length, kv_heads, head_dim] each.

        Valid until the next round's are read.
        """


def backend_name(device: torch.device, dtype: torch.dtype) -> str:
    """``flash-attn`` where it can run (CUDA, half precision, importable), else ``torch-sdpa``."""
    on_gpu = device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)
    return "flash-attn" if on_gpu and _flash_attn() is not None else "torch-sdpa"


@cache
def _flash_attn() -> Any:
    """flash-attn's function of a batch; None where it is not installed, or not built for this torch."""
    try:
        return importlib.import_module("flash_attn").flash_attn_func
    except (ImportError, AttributeError) as error:
        log.info("torch computes the attention, as flash-attn cannot be loaded: %s", error)
    return None


def attend(
    query: Tensor,
    layer: int,
    spans: Sequence[QuerySpan],
    kv: StepKV,
    pool: ThreadPool = SINGLE_THREAD,
    out: Tensor | None = None,
) -> Tensor:
    """Attention for every span of a pack.

    Args:
        query: [tokens, heads, head_dim], after norm and RoPE.
        pool: threads that take a head each.
        out: where the result goes, [tokens, heads, head_dim].

    Returns:
        [tokens, heads * head_dim].
    """
    flash = backend_name(query.device, query.dtype) == "flash-attn"
    one_span = _flash_attention if flash else _sdpa_attention
    out = torch.empty_like(query) if out is None else out
    for together in kv.rounds(spans):
        _attend_round(query, layer, together, kv, pool, out, one_span)
    return out.flatten(1)


def _attend_round(
    query: Tensor, layer: int, spans: Sequence[QuerySpan], kv: StepKV, pool: ThreadPool, out: Tensor, one_span: OneSpan
) -> None:
    past = {sequence: kv.read(layer, sequence) for sequence in {span.sequence for span in spans}}

    def attend_part(part: tuple[QuerySpan, slice, slice]) -> None:
        span, heads, kv_heads = part
        key, value = (each[:, kv_heads] for each in past[span.sequence])
        rows = slice(span.start, span.stop)
        out[rows, heads] = one_span(query[rows, heads], key, value, span.causal)

    pool.parallel_for(
        attend_part, [part for span in spans for part in _parts(span, query, past[span.sequence][0], pool)]
    )


def _parts(span: QuerySpan, query: Tensor, key: Tensor, pool: ThreadPool) -> Iterator[tuple[QuerySpan, slice, slice]]:
    """A span with the heads of queries, and those of keys, that one thread takes: all, or one each."""
    heads, kv_heads = query.shape[1], key.shape[1]
    rows = span.stop - span.start
    if pool.size == 1 or rows < LEAST_ROWS or rows * len(key) < WORTH_SHARING:
        yield span, slice(0, heads), slice(0, kv_heads)
        return
    for head in range(heads):
        kv_head = head * kv_heads // heads
        yield span, slice(head, head + 1), slice(kv_head, kv_head + 1)


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
    """As :func:`_sdpa_attention`: where there are fewer rows than keys, ``causal`` has the last ones meet."""
    out: Tensor = _flash_attn()(query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0), causal=causal)
    return out.squeeze(0)
