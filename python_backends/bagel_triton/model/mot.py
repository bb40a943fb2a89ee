"""The mixture-of-transformers: Qwen2 layers with two experts per weight, one attention.

A pack holds tokens of many sequences, sorted by expert: the first ``gen_rows`` rows
use the generation experts (``*_moe_gen``), the rest the understanding experts.
Sorting makes every expert's rows one slice, so no layer gathers or scatters.

Everything but the attention is a row's own affair and is done a block of rows at a time:
what is made on the way from one matrix product to the next stays in the processor's cache,
and needs no memory that grows with the pack. Whoever runs the pack says who shares the
blocks (:class:`ThreadPool`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bagel_triton.model.attention import attend
from bagel_triton.model.batch import GEN, UND, Block, PackedBatch
from bagel_triton.model.config import LanguageConfig
from bagel_triton.model.cpu.linear import add_linear, linear, silu_product
from bagel_triton.model.cpu.thread_pool import SINGLE_THREAD, ThreadPool


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor, room: Tensor | None = None) -> Tensor:
        """Normalise ``x`` [..., size]; the result may be in ``room``, which may be ``x`` itself."""
        if x.device.type != "cpu":
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        # torch composes it of six passes on a CPU; this is three.
        norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = (norm.square_() / x.shape[-1]).add_(self.eps).rsqrt_()
        return torch.mul(x, scale, out=torch.empty_like(x) if room is None else room).mul_(self.weight)


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
    torch.mul(x, cos, out=out)
    (first, second), halves, sines = (part.chunk(2, dim=-1) for part in (x, out, sin))
    for half, other, sine in zip(halves, (second, first), sines, strict=True):
        half.addcmul_(other, sine)


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
                rotate(getattr(self, f"{name}_norm{expert}")(heads, heads), *tables, out=place)

    def merge(self, expert: str, attended: Tensor, residual: Tensor) -> None:
        """Add what all heads found, [rows, heads * head_dim], to ``residual`` [rows, hidden]."""
        add_linear(attended, getattr(self, f"o_proj{expert}").weight, residual)


class MLP(nn.Module):
    """Gated SiLU feed-forward of one expert."""

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, residual: Tensor, room: tuple[Tensor, ...]) -> None:
        """Add its output of ``x`` to ``residual``, [rows, hidden] both.

        ``room`` is twice [rows or more, intermediate].
        """
        gate, up = (whole[: len(x)] for whole in room)
        gate, up = _apply(self.gate_proj, x, gate), _apply(self.up_proj, x, up)
        add_linear(silu_product(gate, up), self.down_proj.weight, residual)


def _apply(layer: nn.Linear, x: Tensor, out: Tensor | None = None) -> Tensor:
    return linear(x, layer.weight, layer.bias, out)


class ScratchBuffers:
    """Memory that the layers of one forward use one after the other, so that none has to ask for its own."""

    def __init__(self, config: LanguageConfig, x: Tensor, pack: PackedBatch, pool: ThreadPool) -> None:
        heads = config.num_heads, config.num_kv_heads, config.num_kv_heads
        #: queries, keys and values of all rows
        self.projected = tuple(x.new_empty(len(x), count, config.head_dim) for count in heads)
        self.attended = torch.empty_like(self.projected[0])
        rows = max((block.stop - block.start for _, block in pack.blocks), default=0)
        #: of an MLP, a set for each of the pool: whoever works takes one and puts it back
        self.inner = deque(
            tuple(x.new_empty(rows, config.intermediate_size) for _ in range(2)) for _ in range(pool.size)
        )


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

    def project(self, layer: int, block: Block, x: Tensor, pack: PackedBatch, room: ScratchBuffers) -> None:
        """Queries, keys and values of a block of ``x`` [tokens, hidden], into ``room`` and the pack's store."""
        expert, rows = block
        normed = self._norm("input_layernorm", expert, x[rows])
        places = tuple(part[rows] for part in room.projected)
        self.self_attn.project(expert, normed, (pack.cos[rows], pack.sin[rows]), places)
        _, key, value = room.projected
        pack.kv.write(layer, key, value, rows)

    def finish(self, block: Block, x: Tensor, room: ScratchBuffers) -> None:
        """Replace a block of ``x`` by the layer's output."""
        expert, rows = block
        residual = x[rows]
        self.self_attn.merge(expert, room.attended[rows].flatten(1), residual)
        normed = self._norm("post_attention_layernorm", expert, residual)
        inner = room.inner.pop()
        getattr(self, f"mlp{expert}")(normed, residual, inner)
        room.inner.append(inner)


class Transformer(nn.Module):
    """Embedding, layers and the two final norms."""

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self._config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.norm_moe_gen = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, embeddings: Tensor, pack: PackedBatch) -> Tensor:
        """Hidden states [tokens, hidden] of a pack's embeddings, before the final norm."""
        x = torch.empty_like(embeddings)  # which the layers work in
        largest = self._config.hidden_size * self._config.intermediate_size
        if pack.keeps_pool_busy or not pack.pool.prefers_intraop_threads(largest):
            self._run(embeddings, x, pack, pack.pool)
        else:
            pack.pool.run_with_intraop_threads(lambda: self._run(embeddings, x, pack, SINGLE_THREAD))
        return x

    def _run(self, embeddings: Tensor, x: Tensor, pack: PackedBatch, pool: ThreadPool) -> None:
        layers: Sequence[Layer] = self.layers  # type: ignore[assignment]
        room = ScratchBuffers(self._config, x, pack, pool)

        def begin(block: Block) -> None:
            _, rows = block
            x[rows] = embeddings[rows]
            layers[0].project(0, block, x, pack, room)

        def pass_on(index: int, block: Block) -> None:  # out of a layer, and into the next while it is in the cache
            layers[index].finish(block, x, room)
            if index + 1 < len(layers):
                layers[index + 1].project(index + 1, block, x, pack, room)

        pool.parallel_for(begin, pack.blocks)
        for index in range(len(layers)):
            last = index + 1 == len(layers)
            spans = [span for span in pack.spans if not last or pack.leads_on(span)]
            attend(room.projected[0], index, spans, pack.kv, pool, room.attended)
            blocks = [block for block in pack.blocks if not last or pack.leads_on(block[1])]
            pool.parallel_for(partial(pass_on, index), blocks)
