"""Attention of a batch's queries to keys and values that a store holds.

:class:`StepKV` is all that the network knows of it. :class:`SequenceKV` implements it with
torch's own attention, or flash-attn's, over one sequence at a time.
"""

from __future__ import annotations

import importlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

log = logging.getLogger(__name__)


class StepKV(Protocol):
    """The keys and values of one forward: it stores the new ones and attends to all.

    One is built for each batch. It knows which rows belong to a sequence, which keys they see and
    where those are, so the network passes nothing but tensors. A paged kernel, one rank's share
    of the heads or the static buffers of a CUDA graph are implementations beside those of
    ``kv/store.py``.
    """

    def write(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Store the new keys and values of all rows, [tokens, kv_heads, head_dim] each, in the batch's order."""

    def attend(self, layer: int, query: Tensor) -> Tensor:
        """What each row finds in its sequence, once the layer's keys and values are written.

        query [tokens, heads, head_dim], after norm and rotation; same shape out.
        """


@dataclass(frozen=True)
class QuerySpan:
    """Rows ``start:stop`` of a batch that attend to all keys of one sequence.

    With ``causal`` the rows are the sequence's last tokens and each sees no later one: the mask
    is aligned at the lower right. Otherwise every row sees every key, those of the batch included.
    """

    start: int
    stop: int
    sequence: int
    causal: bool

    @property
    def rows(self) -> slice:
        return slice(self.start, self.stop)


class SequenceKV(ABC):
    """A :class:`StepKV` whose keys and values are read one sequence at a time.

    ``spans`` are those of the batch, every row in one of them. The CPU executor writes tiles of
    rows from several threads and attends a head at a time, by way of the abstract methods.
    """

    spans: Sequence[QuerySpan]

    @abstractmethod
    def write_rows(self, layer: int, key: Tensor, value: Tensor, rows: slice) -> None:
        """Store ``rows`` of the batch's new keys and values, [tokens, kv_heads, head_dim] each.

        Every row is written once, from any thread, before a sequence of the layer is read.
        """

    @abstractmethod
    def rounds(self, spans: Sequence[QuerySpan]) -> Iterable[Sequence[QuerySpan]]:
        """``spans`` in groups; the sequences of a group can be read at the same time."""

    @abstractmethod
    def read(self, layer: int, sequence: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a sequence, past and new: [length, kv_heads, head_dim] each.

        They are valid until a sequence of the next group is read.
        """

    def write(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Store the new keys and values of all rows."""
        self.write_rows(layer, key, value, slice(0, len(key)))

    def attend(self, layer: int, query: Tensor) -> Tensor:
        """Attention of every span, one after the other."""
        out = torch.empty_like(query)
        for group in self.rounds(self.spans):
            read = {sequence: self.read(layer, sequence) for sequence in {span.sequence for span in group}}
            for span in group:
                out[span.rows] = attend(query[span.rows], *read[span.sequence], span.causal)
        return out


def attend(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Tensor:
    """Attention of one sequence's last rows.

    query [rows, heads, head_dim], key and value [length, kv_heads, head_dim] -> [rows, heads, head_dim].
    """
    if backend_name(query.device, query.dtype) == "flash-attn":
        # Its mask is aligned at the lower right, as ours is.
        out: Tensor = _flash_attn()(query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0), causal=causal)
        return out.squeeze(0)
    rows, length = query.shape[0], key.shape[0]
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))  # [1, heads, tokens, head_dim]
    mask = None
    if causal and 1 < rows < length:
        # torch's is_causal is aligned at the upper left.
        mask = torch.ones(rows, length, dtype=torch.bool, device=query.device).tril(length - rows)
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal and rows == length, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.squeeze(0).transpose(0, 1)


def backend_name(device: torch.device, dtype: torch.dtype) -> str:
    """``flash-attn`` where it can run (CUDA, half precision, importable), else ``torch-sdpa``."""
    on_gpu = device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)
    return "flash-attn" if on_gpu and _flash_attn() is not None else "torch-sdpa"


@cache
def _flash_attn() -> Any:
    """flash-attn's function for one batch; None where it is not installed or was built for another torch."""
    try:
        return importlib.import_module("flash_attn").flash_attn_func
    except (ImportError, AttributeError) as error:
        log.info("torch computes the attention, as flash-attn cannot be loaded: %s", error)
    return None
