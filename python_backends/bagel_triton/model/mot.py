"""BAGEL's mixture of transformers: Qwen2 layers with two experts and one attention.

An understanding and a generation expert have their own weights for all that is computed for a
token on its own: norms, projections and the feed-forward. Attention is common to both and sees
the tokens of either (arXiv 2505.14683, section 2).

A batch holds the rows of many sequences, sorted by expert: ``[gen rows | und rows]``. Each
expert's rows are one slice then, and no layer gathers or scatters rows. Which rows belong to a
sequence, and where its keys and values are, is known to ``kv`` alone.

These are plain modules, so parallelism, quantisation and CUDA graphs can be applied from outside.
A tensor-parallel rank holds some of the heads: the number of heads follows from the width of
``qkv_proj``'s output. On a CPU :class:`~bagel_triton.model.cpu.executor.CpuExecutor` computes
the same from the same weights, faster.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bagel_triton.model.attention import QuerySpan, StepKV
from bagel_triton.model.config import LanguageConfig
from bagel_triton.model.lora import AdaptedRows


@dataclass(frozen=True)
class PackedBatch:
    """The tokens of one forward, apart from their embeddings: ``[gen rows | und rows]``.

    ``cos`` and ``sin`` are the rotary tables of the rows' positions, [tokens, 1, head_dim] each.
    The order of rows within an expert is free.

    Rows outside ``wanted`` get keys and values in every layer; their hidden states are
    undefined, so an executor may skip the rest of the last layer for them. None wants all rows.

    ``adapted`` are the rows that have a LoRA adapter, which the executors of ``cpu/`` and ``cuda/`` compute.
    """

    gen_rows: int
    cos: Tensor
    sin: Tensor
    wanted: slice | None = None
    adapted: tuple[AdaptedRows, ...] = ()

    @property
    def tokens(self) -> int:
        """Rows of both experts."""
        return len(self.cos)

    def wants(self, rows: slice | QuerySpan) -> bool:
        """Whether the hidden states of some of these rows are wanted."""
        return self.wanted is None or (rows.start < self.wanted.stop and rows.stop > self.wanted.start)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x [..., size], same shape out."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def rotary_tables(positions: Tensor, config: LanguageConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines for int64 ``positions`` [tokens]: [tokens, 1, head_dim] each.

    The first half of the sines is negated, as :func:`rotate` needs it.
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=positions.device) / config.head_dim
    angles = (positions.float()[:, None] * (1.0 / config.rope_theta**exponents)).unsqueeze(1)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)  # [tokens, 1, head_dim / 2]
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding in its half-split form: x [tokens, heads, head_dim], same shape out."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((second, first), dim=-1) * sin


class MLP(nn.Module):
    """Gated SiLU feed-forward; ``gate_up_proj`` is the gate's projection, then the other factor's."""

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [rows, hidden], same shape out."""
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate).mul_(up))  # type: ignore[no-any-return]


class Expert(nn.Module):
    """One expert's part of a layer: the operations before its attention, and those after it.

    ``qkv_proj`` is the queries' projection, then the keys' and the values'. Several query heads
    share a key head.
    """

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self.head_dim, self.queries_per_key = config.head_dim, config.num_heads // config.num_kv_heads
        query_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.qkv_proj = nn.Linear(config.hidden_size, query_size + 2 * kv_size)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=False)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of x [rows, hidden]: [rows, (kv_)heads, head_dim] each."""
        heads = self.qkv_proj(self.input_layernorm(x)).unflatten(-1, (-1, self.head_dim))
        kv_heads = heads.shape[1] // (self.queries_per_key + 2)
        query, key, value = heads.split((self.queries_per_key * kv_heads, kv_heads, kv_heads), dim=1)
        return rotate(self.q_norm(query), cos, sin), rotate(self.k_norm(key), cos, sin), value

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """The layer's output for x [rows, hidden], given what its heads found, [rows, heads, head_dim]."""
        x = x + self.o_proj(attended.flatten(1))
        return x + self.mlp(self.post_attention_layernorm(x))  # type: ignore[no-any-return]


class Layer(nn.Module):
    """One decoder layer: two experts around one attention."""

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self.gen, self.und = Expert(config), Expert(config)

    def experts(self, batch: PackedBatch) -> Iterator[tuple[Expert, slice]]:
        """The experts that have rows, and those rows, in order; of a batch without rows the first."""
        for expert, start, stop in ((self.gen, 0, batch.gen_rows), (self.und, batch.gen_rows, batch.tokens)):
            if start < stop or (expert is self.gen and not batch.tokens):
                yield expert, slice(start, stop)

    def forward(self, x: Tensor, batch: PackedBatch, kv: StepKV, layer: int) -> Tensor:
        """x [tokens, hidden], same shape out; ``layer`` is this layer's number in ``kv``."""
        projected = [expert.project(x[rows], batch.cos[rows], batch.sin[rows]) for expert, rows in self.experts(batch)]
        query, key, value = (_joined(parts) for parts in zip(*projected, strict=True))
        kv.write(layer, key, value)
        attended = kv.attend(layer, query)
        del projected, query, key, value  # the feed-forward needs the memory
        return _joined([expert.finish(x[rows], attended[rows]) for expert, rows in self.experts(batch)])


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """The experts' rows in one tensor; no copy where one expert has them all."""
    return torch.cat(list(parts)) if len(parts) > 1 else parts[0]


Reduce = Callable[[Tensor], None]  # sums a contiguous tensor over the ranks that have the other heads, in place


class Offload(Protocol):
    """Layers that are not always on the device: see :mod:`bagel_triton.model.offload`."""

    def forward(self) -> AbstractContextManager[None]:
        """Around each forward."""

    def fetch(self, layer: int) -> None:
        """Before the layer number ``layer`` is computed."""


class Transformer(nn.Module):
    """Embedding, layers and the two final norms."""

    offload: Offload | None = None

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.norm_moe_gen = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, embeddings: Tensor, batch: PackedBatch, kv: StepKV) -> Tensor:
        """Hidden states of a batch's embeddings, before the final norm: [tokens, hidden], same shape out."""
        x = embeddings
        for number, layer in enumerate(self.layers):
            if self.offload is not None:
                self.offload.fetch(number)
            x = layer(x, batch, kv, number)
        return x
