"""The mixture-of-transformers: Qwen2 layers with two experts per weight, one attention.

A pack holds tokens of many sequences, sorted by expert: the first ``gen_rows`` rows
use the generation experts (``*_moe_gen``), the rest the understanding experts.
Sorting makes every expert's rows one slice, so no layer gathers or scatters.

Everything but the attention is a row's own affair and is done a block of rows at a time:
what is made on the way from one matrix product to the next stays in the processor's cache,
and needs no memory that grows with the pack.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bagel_triton.model.attention import Span, StepKV, attend
from bagel_triton.model.config import LanguageConfig
from bagel_triton.model.linear import linear, silu_product

UND, GEN = "", "_moe_gen"  # suffixes of the experts' names
BLOCK_ROWS = 512  # of a block on a CPU: an MLP's inner rows are a few MB then


@dataclass(frozen=True)
class Pack:
    """One forward's tokens, apart from their embeddings: [gen rows | und rows].

    ``cos`` and ``sin`` are the rotary tables of the rows' positions, [tokens, 1, head_dim].
    """

    gen_rows: int
    cos: Tensor
    sin: Tensor
    spans: Sequence[Span]
    kv: StepKV

    @cached_property
    def blocks(self) -> tuple[tuple[str, slice], ...]:
        """Every row once, in slices of one expert each, with the suffix of the expert's names."""
        return tuple(self._cut(GEN, 0, self.gen_rows)) + tuple(self._cut(UND, self.gen_rows, len(self.cos)))

    def _cut(self, expert: str, start: int, stop: int) -> Iterator[tuple[str, slice]]:
        step = BLOCK_ROWS if self.cos.device.type == "cpu" else max(stop - start, 1)
        for first in range(start, stop, step):
            yield expert, slice(first, min(first + step, stop))


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` [..., size]."""
        if x.device.type != "cpu":
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        # torch composes it of six passes on a CPU; this is three.
        norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = (norm.square_() / x.shape[-1]).add_(self.eps).rsqrt_()
        normed: Tensor = (x * scale).to(x.dtype)
        return normed.mul_(self.weight)


def rotary_tables(positions: Tensor, config: LanguageConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines for int64 ``positions`` [tokens]: [tokens, 1, head_dim] each.

    The first half of the sines is negated, as :func:`rotate` needs it.
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=positions.device) / config.head_dim
    angles = (positions.float()[:, None] * (1.0 / config.rope_theta**exponents)).unsqueeze(1)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)  # [tokens, 1, head_dim / 2]
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
    """Rotary embedding, half-split form, of ``x`` into ``out``, both [tokens, heads, head_dim]."""
    first, second = x.chunk(2, dim=-1)
    torch.mul(x, cos, out=out).add_(torch.cat((second, first), dim=-1).mul_(sin))


class Attention(nn.Module):
    """Grouped-query attention with per-head q/k norm and two experts."""

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        query_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        for expert in (UND, GEN):
            self.add_module(f"q_proj{expert}", nn.Linear(config.hidden_size, query_size))
            self.add_module(f"k_proj{expert}", nn.Linear(config.hidden_size, kv_size))
            self.add_module(f"v_proj{expert}", nn.Linear(config.hidden_size, kv_size))
            self.add_module(f"o_proj{expert}", nn.Linear(query_size, config.hidden_size, bias=False))
            self.add_module(f"q_norm{expert}", RMSNorm(config.head_dim, config.rms_norm_eps))
            self.add_module(f"k_norm{expert}", RMSNorm(config.head_dim, config.rms_norm_eps))

    def project(self, expert: str, x: Tensor, tables: tuple[Tensor, Tensor], out: tuple[Tensor, ...]) -> None:
        """Queries and keys, normed and rotated, and values of one expert's rows, into their place in ``out``.

        x [rows, hidden]; out [rows, (kv_)heads, head_dim] each.
        """
        for name, place in zip("qkv", out, strict=True):
            projection, flat = getattr(self, f"{name}_proj{expert}"), place.flatten(1)
            heads = _apply(projection, x, flat if name == "v" else None).view_as(place)
            if name != "v":
                rotate(getattr(self, f"{name}_norm{expert}")(heads), *tables, out=place)

    def merge(self, expert: str, attended: Tensor) -> Tensor:
        """What all heads found, [rows, heads * head_dim] -> [rows, hidden]."""
        return _apply(getattr(self, f"o_proj{expert}"), attended)


class MLP(nn.Module):
    """Gated SiLU feed-forward of one expert."""

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, room: tuple[Tensor, ...]) -> Tensor:
        """x [rows, hidden] -> [rows, hidden]; ``room`` is three times [rows or more, intermediate]."""
        gate, up, spare = (whole[: len(x)] for whole in room)
        gate, up = _apply(self.gate_proj, x, gate), _apply(self.up_proj, x, up)
        return _apply(self.down_proj, silu_product(gate, up, spare))


def _apply(layer: nn.Linear, x: Tensor, out: Tensor | None = None) -> Tensor:
    return linear(x, layer.weight, layer.bias, out)


class Room:
    """Memory that the layers of one forward use one after the other, so that none has to ask for its own."""

    def __init__(self, config: LanguageConfig, x: Tensor, pack: Pack) -> None:
        heads = config.num_heads, config.num_kv_heads, config.num_kv_heads
        self.projected = tuple(x.new_empty(len(x), count, config.head_dim) for count in heads)
        rows = max((block.stop - block.start for _, block in pack.blocks), default=0)
        self.inner = tuple(x.new_empty(rows, config.intermediate_size) for _ in range(3))


class Layer(nn.Module):
    """One decoder layer; both experts share nothing but the attention itself."""

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        for expert in (UND, GEN):
            self.add_module(f"mlp{expert}", MLP(config))
            self.add_module(f"input_layernorm{expert}", RMSNorm(config.hidden_size, config.rms_norm_eps))
            self.add_module(f"post_attention_layernorm{expert}", RMSNorm(config.hidden_size, config.rms_norm_eps))

    def _norm(self, name: str, expert: str, x: Tensor) -> Tensor:
        return getattr(self, f"{name}{expert}")(x)  # type: ignore[no-any-return]

    def forward(self, x: Tensor, layer: int, pack: Pack, room: Room) -> None:
        """Replace ``x`` [tokens, hidden] by the layer's output; writes the pack's keys and values."""
        for expert, rows in pack.blocks:
            normed = self._norm("input_layernorm", expert, x[rows])
            places = tuple(part[rows] for part in room.projected)
            self.self_attn.project(expert, normed, (pack.cos[rows], pack.sin[rows]), places)
        query, key, value = room.projected
        pack.kv.write(layer, key, value)
        attended = attend(query, layer, pack.spans, pack.kv)
        for expert, rows in pack.blocks:
            block = x[rows]
            block += self.self_attn.merge(expert, attended[rows])
            normed = self._norm("post_attention_layernorm", expert, block)
            block += getattr(self, f"mlp{expert}")(normed, room.inner)


class Transformer(nn.Module):
    """Embedding, layers and the two final norms."""

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self._config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.norm_moe_gen = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, pack: Pack) -> Tensor:
        """Hidden states [tokens, hidden] of a pack's embeddings, before the final norm."""
        x, room = x.clone(), Room(self._config, x, pack)  # the layers work in place
        for index, layer in enumerate(self.layers):
            layer(x, index, pack, room)
        return x
