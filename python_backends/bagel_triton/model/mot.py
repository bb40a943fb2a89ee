"""The mixture-of-transformers: Qwen2 layers with two experts per weight, one attention.

A pack holds tokens of many sequences, sorted by expert: the first ``gen_rows`` rows
use the generation experts (``*_moe_gen``), the rest the understanding experts.
Sorting makes every expert's rows one slice, so no layer gathers or scatters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bagel_triton.model.attention import Span, StepKV, attend
from bagel_triton.model.config import LanguageConfig
from bagel_triton.model.linear import expert_linear, silu_product


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


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` [..., size]."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def expert_norm(und: RMSNorm, gen: RMSNorm, x: Tensor, gen_rows: int) -> Tensor:
    """Each row of ``x`` through its expert's norm."""
    if gen_rows == 0:
        return und(x)  # type: ignore[no-any-return]
    if gen_rows == x.shape[0]:
        return gen(x)  # type: ignore[no-any-return]
    return torch.cat((gen(x[:gen_rows]), und(x[gen_rows:])))


def rotary_tables(positions: Tensor, config: LanguageConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines for int64 ``positions`` [tokens]: [tokens, 1, head_dim] each."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=positions.device) / config.head_dim
    angles = positions.float()[:, None] * (1.0 / config.rope_theta**exponents)  # [tokens, head_dim / 2]
    angles = torch.cat((angles, angles), dim=-1).unsqueeze(1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, half-split form, of ``x`` [tokens, heads, head_dim]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Attention(nn.Module):
    """Grouped-query attention with per-head q/k norm and two experts."""

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        query_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        for suffix in ("", "_moe_gen"):
            self.add_module(f"q_proj{suffix}", nn.Linear(config.hidden_size, query_size))
            self.add_module(f"k_proj{suffix}", nn.Linear(config.hidden_size, kv_size))
            self.add_module(f"v_proj{suffix}", nn.Linear(config.hidden_size, kv_size))
            self.add_module(f"o_proj{suffix}", nn.Linear(query_size, config.hidden_size, bias=False))
            self.add_module(f"q_norm{suffix}", RMSNorm(config.head_dim, config.rms_norm_eps))
            self.add_module(f"k_norm{suffix}", RMSNorm(config.head_dim, config.rms_norm_eps))

    def _project(self, name: str, x: Tensor, gen_rows: int) -> Tensor:
        return expert_linear(getattr(self, name), getattr(self, f"{name}_moe_gen"), x, gen_rows)

    def _heads(self, name: str, x: Tensor, gen_rows: int) -> Tensor:
        rows = self._project(f"{name}_proj", x, gen_rows)
        return rows.view(len(rows), -1, self.head_dim)

    def _normed(self, name: str, x: Tensor, pack: Pack) -> Tensor:
        heads = self._heads(name, x, pack.gen_rows)
        norms = getattr(self, f"{name}_norm"), getattr(self, f"{name}_norm_moe_gen")
        return rotate(expert_norm(*norms, heads, pack.gen_rows), pack.cos, pack.sin)

    def forward(self, x: Tensor, layer: int, pack: Pack) -> Tensor:
        """x [tokens, hidden] -> [tokens, hidden]; writes the pack's keys and values."""
        query = self._normed("q", x, pack)  # [tokens, heads, head_dim]
        key = self._normed("k", x, pack)  # [tokens, kv_heads, head_dim]
        pack.kv.write(layer, key, self._heads("v", x, pack.gen_rows))
        return self._project("o_proj", attend(query, layer, pack.spans, pack.kv), pack.gen_rows)


class MLP(nn.Module):
    """Gated SiLU feed-forward of one expert."""

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)


class Layer(nn.Module):
    """One decoder layer; both experts share nothing but the attention itself."""

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        for suffix in ("", "_moe_gen"):
            self.add_module(f"mlp{suffix}", MLP(config))
            self.add_module(f"input_layernorm{suffix}", RMSNorm(config.hidden_size, config.rms_norm_eps))
            self.add_module(f"post_attention_layernorm{suffix}", RMSNorm(config.hidden_size, config.rms_norm_eps))

    def _norm(self, name: str, x: Tensor, gen_rows: int) -> Tensor:
        return expert_norm(getattr(self, name), getattr(self, f"{name}_moe_gen"), x, gen_rows)

    def _mlp(self, x: Tensor, gen_rows: int) -> Tensor:
        und: MLP = self.mlp  # type: ignore[assignment]
        gen: MLP = self.mlp_moe_gen  # type: ignore[assignment]
        gate = expert_linear(und.gate_proj, gen.gate_proj, x, gen_rows)
        up = expert_linear(und.up_proj, gen.up_proj, x, gen_rows)
        return expert_linear(und.down_proj, gen.down_proj, silu_product(gate, up), gen_rows)

    def forward(self, x: Tensor, layer: int, pack: Pack) -> Tensor:
        """x [tokens, hidden] -> [tokens, hidden]."""
        x = x + self.self_attn(self._norm("input_layernorm", x, pack.gen_rows), layer, pack)
        return x + self._mlp(self._norm("post_attention_layernorm", x, pack.gen_rows), pack.gen_rows)


class Transformer(nn.Module):
    """Embedding, layers and the two final norms."""

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.norm_moe_gen = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, pack: Pack) -> Tensor:
        """Hidden states [tokens, hidden] of a pack's embeddings, before the final norm."""
        for index, layer in enumerate(self.layers):
            x = layer(x, index, pack)
        return x
