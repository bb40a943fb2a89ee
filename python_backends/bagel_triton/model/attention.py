"""Attention of a batch's queries to keys and values that a store holds.

:class:`StepKV` is all that the network knows of it. :class:`SequenceKV` implements it with
torch's own attention over one sequence at a time; ``kv/store.py`` all at once, on a GPU.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import NamedTuple, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor


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
        """Attention of each row over its sequence, after the layer's keys and values are written.

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


MIN_QUERY_ROWS = 4  # on a CPU


def attend(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Tensor:
    """Attention of one sequence's last rows.

    query [rows, heads, head_dim], key and value [length, kv_heads, head_dim] -> [rows, heads, head_dim].
    """
    rows, length = query.shape[0], key.shape[0]
    if rows < MIN_QUERY_ROWS and query.device.type == "cpu":
        return _attend_few(query, key, value, causal)
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))  # [1, heads, tokens, head_dim]
    mask: Tensor | None = None
    if causal and 1 < rows < length:
        # torch's is_causal is aligned at the upper left.
        if query.device.type == "cuda":
            from torch.nn.attention.bias import causal_lower_right  # it imports torch's compiler: 0.7 s, 70 MiB

            mask = cast(Tensor, causal_lower_right(rows, length))  # flash refuses any other mask
        else:
            mask = torch.ones(rows, length, dtype=torch.bool, device=query.device).tril(length - rows)
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal and rows == length, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.squeeze(0).transpose(0, 1)


def _attend_few(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Tensor:
    """:func:`attend` with rows added, which are left out of the result.

    Products of one to three rows depend, on some processors, on where torch's threads have their scratch memory.
    """
    rows, length = query.shape[0], key.shape[0]
    padded = F.pad(query, (0, 0, 0, 0, 0, MIN_QUERY_ROWS - rows))
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (padded, key, value))
    mask: Tensor | None = None
    if causal and rows > 1:
        mask = torch.ones(MIN_QUERY_ROWS, length, dtype=torch.bool).tril(length - rows)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
    return out.squeeze(0).transpose(0, 1)[:rows]


FLASH_3 = "flash_attn_interface"  # FlashAttention's package for Hopper, which torch can call in place of its own kernel


class AttentionKernel(NamedTuple):
    """The kernel of the attention, and why it is that one."""

    name: str
    why: str

    @property
    def is_flash(self) -> bool:
        """Whether all sequences are one call of torch's flash operation, which a CUDA graph can capture."""
        return self.name.startswith("flash")


@cache
def attention_kernel(device: torch.device, dtype: torch.dtype) -> AttentionKernel:
    """The kernel for a device and dtype; on a GPU, cuDNN's is switched off for the whole process."""
    if device.type != "cuda":
        return AttentionKernel("torch-sdpa", "on a CPU, a sequence at a time")
    # It builds a plan for every new number of keys, so for every token of a text.
    torch.backends.cuda.enable_cudnn_sdp(False)
    if dtype not in (torch.bfloat16, torch.float16):
        return AttentionKernel("torch-sdpa", f"flash takes no {dtype}".replace("torch.", ""))
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return AttentionKernel("torch-sdpa", f"flash needs compute capability 8.0, not {major}.{minor}")
    if not torch.backends.cuda.is_flash_attention_available():
        return AttentionKernel("torch-sdpa", "this torch was built without flash")
    if (major, minor) != (9, 0):
        return AttentionKernel("flash-2", f"torch's own; flash-3 needs compute capability 9.0, not {major}.{minor}")
    if find_spec(FLASH_3) is None:
        return AttentionKernel("flash-2", f"torch's own; {FLASH_3} is not installed")
    activate = getattr(torch.nn.attention, "activate_flash_attention_impl", None)
    if activate is None:
        return AttentionKernel("flash-2", f"torch's own; {FLASH_3} needs torch 2.11, not {torch.__version__}")
    try:
        activate("FA3")  # for torch's flash operation, in the whole process
    except (ImportError, RuntimeError) as error:
        return AttentionKernel("flash-2", f"torch's own; {FLASH_3} cannot be used: {error}")
    return AttentionKernel("flash-3", f"{FLASH_3} is installed")
