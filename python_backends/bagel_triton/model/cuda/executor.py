"""The transformer on a GPU: the plain modules' weights in fewer, larger operations.

Every operation is a launch, which takes the host longer than small ones take the GPU. So both experts write their
rows into one tensor, queries and keys are normed and rotated together, and products add to the residual themselves.
A few rows of one expert, such as an image's vision tokens, take as long as their weights take to be read, while many
of the other take as long as they are computed: they run beside each other, in two streams.
Hidden states are those of :meth:`Transformer.forward` to rounding. No GPU has run this yet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bagel_triton.model.attention import StepKV
from bagel_triton.model.lora import QKV, LayerUpdates, LowRank, within
from bagel_triton.model.mot import Expert, Layer, PackedBatch, Reduce, Transformer
from bagel_triton.model.quantization import QuantizedLinear

FEW_ROWS = 64  # of one expert, which run beside the other's


@dataclass(frozen=True)
class _Part:
    """An expert, its rows, the weights of its query and key norms, [heads + kv_heads, head_dim], and the updates of
    the rows' adapters."""

    expert: Expert
    rows: slice
    head_norms: Tensor
    updates: LayerUpdates


class CudaExecutor:
    """Runs ``transformer``; build it when the weights are there. ``reduce`` sums a tensor over ranks, in place."""

    def __init__(self, transformer: Transformer, reduce: Reduce | None = None) -> None:
        self._reduce = reduce
        self._layers: list[Layer] = list(transformer.layers)  # type: ignore[arg-type]
        self._config, self._offload = transformer.config, transformer.offload
        device = transformer.norm.weight.device
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None
        with torch.inference_mode():
            self._head_norms = {
                expert: _head_norms(expert)
                for layer in self._layers
                for expert in (layer.gen, layer.und)
                if isinstance(expert, Expert)  # else it was left out
            }

    def __call__(self, embeddings: Tensor, batch: PackedBatch, kv: StepKV) -> Tensor:
        """Hidden states before the final norm, in place of ``embeddings`` [tokens, hidden]."""
        x = embeddings
        for number, layer in enumerate(self._layers):
            if self._offload is not None:
                self._offload.fetch(number)
            last = number == len(self._layers) - 1
            parts = [
                _Part(expert, rows, self._head_norms[expert], _updates(number, expert is layer.gen, batch, rows))
                for expert, rows in layer.experts(batch)
            ]
            query = self._project(x, parts, batch, kv, number)
            wanted = [part for part in parts if not last or batch.wants(part.rows)]
            if wanted:
                self._finish(x, kv.attend(number, query), wanted)
        return x

    def _each(self, parts: list[_Part], work: Callable[[_Part], None]) -> None:
        """``work`` on every part; one of a few rows beside the others.

        Tensors made inside belong to one stream alone: the others' memory is not reused before both have joined.
        """
        few = [part for part in parts if part.rows.stop - part.rows.start <= FEW_ROWS]
        if self._side is None or len(parts) == 1 or not few:
            for part in parts:
                work(part)
            return
        beside, main = few[-1], torch.cuda.current_stream(self._side.device)
        self._side.wait_stream(main)
        with torch.cuda.stream(self._side):
            work(beside)
        for part in parts:
            if part is not beside:
                work(part)
        main.wait_stream(self._side)

    def _project(self, x: Tensor, parts: list[_Part], batch: PackedBatch, kv: StepKV, number: int) -> Tensor:
        """Write the keys and values of x to ``kv``; the queries, [tokens, heads, head_dim]."""
        width = parts[0].expert.qkv_proj.out_features
        kv_heads = width // self._config.head_dim // (parts[0].expert.queries_per_key + 2)
        kv_width = kv_heads * self._config.head_dim
        packed = x.new_empty(len(x), width)

        def project(part: _Part) -> None:
            projection, normed = part.expert.qkv_proj, part.expert.input_layernorm(x[part.rows])
            if isinstance(projection, QuantizedLinear):
                packed[part.rows] = projection(normed)
            else:
                torch.addmm(projection.bias, normed, projection.weight.t(), out=packed[part.rows])
            sizes = (width - 2 * kv_width, kv_width, kv_width)
            for name, columns in zip(QKV, packed[part.rows].split(sizes, dim=1), strict=True):
                part.updates(name, normed, columns)

        self._each(parts, project)
        heads = packed.unflatten(-1, (-1, self._config.head_dim))
        # The values are normed for nothing: of a part of the heads alone the kernel would take a copy first.
        normed = F.rms_norm(heads, (self._config.head_dim,), None, parts[0].expert.q_norm.eps)[:, :-kv_heads]
        for part in parts:
            normed[part.rows].mul_(part.head_norms)
        first, second = normed.chunk(2, dim=-1)
        swapped = torch.cat((second, first), dim=-1)
        normed.mul_(batch.cos).addcmul_(swapped, batch.sin)
        kv.write(number, normed[:, -kv_heads:], heads[:, -kv_heads:])
        return normed[:, :-kv_heads]

    def _finish(self, x: Tensor, attended: Tensor, parts: list[_Part]) -> None:
        """Add to x what follows from the attention, [tokens, heads, head_dim], for the rows of ``parts``."""
        first, stop = parts[0].rows.start, parts[-1].rows.stop
        if self._reduce is not None:
            found = attended[first:stop].flatten(1)
            self._add_over_ranks(x, parts, found, [part.expert.o_proj for part in parts], self._reduce)
        inner = x.new_empty(stop - first, parts[0].expert.mlp.gate_up_proj.out_features)

        def expand(part: _Part) -> None:
            expert, residual = part.expert, x[part.rows]
            if self._reduce is None:
                found = attended[part.rows].flatten(1)
                _add_product(found, expert.o_proj, residual)
                part.updates("o_proj", found, residual)
            own = inner[part.rows.start - first : part.rows.stop - first]
            normed = expert.post_attention_layernorm(residual)
            if isinstance(expert.mlp.gate_up_proj, QuantizedLinear):
                own.copy_(expert.mlp.gate_up_proj(normed))
            else:
                torch.mm(normed, expert.mlp.gate_up_proj.weight.t(), out=own)
            own_gate, own_up = own.chunk(2, dim=-1)
            part.updates("gate_proj", normed, own_gate)
            part.updates("up_proj", normed, own_up)

        self._each(parts, expand)
        gate, up = inner.chunk(2, dim=-1)
        active = F.silu(gate).mul_(up)

        def contract(part: _Part) -> None:
            own = active[part.rows.start - first : part.rows.stop - first]
            _add_product(own, part.expert.mlp.down_proj, x[part.rows])
            part.updates("down_proj", own, x[part.rows])

        if self._reduce is None:
            self._each(parts, contract)
        else:
            self._add_over_ranks(x, parts, active, [part.expert.mlp.down_proj for part in parts], self._reduce)

    def _add_over_ranks(
        self, x: Tensor, parts: list[_Part], inputs: Tensor, layers: Sequence[nn.Linear], reduce: Reduce
    ) -> None:
        """Add to the rows of ``parts`` the products of ``inputs``, which are these rows', summed over the ranks."""
        first, stop = parts[0].rows.start, parts[-1].rows.stop
        total = x.new_empty(stop - first, x.shape[1])
        layer_of = dict(zip((part.expert for part in parts), layers, strict=True))

        def multiply(part: _Part) -> None:
            rows = slice(part.rows.start - first, part.rows.stop - first)
            torch.mm(inputs[rows], layer_of[part.expert].weight.t(), out=total[rows])

        self._each(parts, multiply)
        reduce(total)
        x[first:stop].add_(total)


def _updates(number: int, gen: bool, batch: PackedBatch, rows: slice) -> LayerUpdates:
    """The updates of adapters to an expert's ``rows`` in a layer."""

    def add(x: Tensor, update: LowRank, out: Tensor) -> None:
        out.addmm_(x @ update.down.t(), update.up.t())

    return LayerUpdates(number, gen, within(batch.adapted, rows), add)


def _head_norms(expert: Expert) -> Tensor:
    kv_heads = expert.qkv_proj.out_features // expert.head_dim // (expert.queries_per_key + 2)
    weights = (expert.q_norm.weight, expert.queries_per_key * kv_heads), (expert.k_norm.weight, kv_heads)
    return torch.cat([weight.expand(heads, -1) for weight, heads in weights])


def _add_product(x: Tensor, layer: nn.Linear | QuantizedLinear, out: Tensor) -> None:
    if isinstance(layer, QuantizedLinear):
        out.add_(layer(x))
    else:
        out.addmm_(x, layer.weight.t())
