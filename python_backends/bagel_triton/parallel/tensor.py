"""Tensor parallelism of the plain transformer, by torch's own means: each rank has some of the heads.

The projections into an attention and a feed-forward are cut by columns and those out of them by rows, so a layer
sums over the ranks twice (arXiv 1909.08053, section 3). torch cuts the weights and keeps them as ``DTensor``; between
a layer's linears each rank has plain tensors of its own heads.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from bagel_triton.model.config import LanguageConfig
from bagel_triton.model.mot import Layer, Transformer
from bagel_triton.model.slim import LeftOut
from bagel_triton.parallel.sizes import kv_heads_of


def shard(transformer: Transformer, mesh: DeviceMesh, device: torch.device) -> None:
    """Keep this rank's part of every layer's weights, in place, on ``device``; nothing is sent.

    Embedding, norms and vocabulary head stay whole. The checkpoint's sizes have passed
    :func:`~bagel_triton.parallel.sizes.check`.
    """
    config, ranks, rank = transformer.config, mesh.size(), mesh.get_local_rank()
    kv_heads = kv_heads_of(config, rank, ranks)
    qkv = _qkv_rows(config, kv_heads, rank, ranks)
    heads = _part(config.num_heads * config.head_dim, rank, ranks)
    inner = _part(config.intermediate_size, rank, ranks)
    gate_up = torch.cat((inner, config.intermediate_size + inner))
    plan: dict[str, ParallelStyle] = {}
    for name in ("gen", "und"):
        if isinstance(getattr(transformer.layers[0], name), LeftOut):
            continue
        plan |= {f"{name}.{column}": ColwiseParallel() for column in ("qkv_proj", "mlp.gate_up_proj")}
        plan |= {f"{name}.{row}": RowwiseParallel() for row in ("o_proj", "mlp.down_proj")}
    layers: list[Layer] = list(transformer.layers)  # type: ignore[arg-type]
    for layer in layers:
        for expert in _experts(layer):
            expert.queries_per_key = config.num_heads // ranks // (kv_heads.stop - kv_heads.start)
            for linear, outputs in ((expert.qkv_proj, qkv), (expert.mlp.gate_up_proj, gate_up)):
                linear.weight = _own(linear.weight[outputs].to(device), mesh, 0)
                if linear.bias is not None:
                    linear.bias = _own(linear.bias[outputs].to(device), mesh, 0)
            for linear, inputs in ((expert.o_proj, heads), (expert.mlp.down_proj, inner)):
                linear.weight = _own(linear.weight[:, inputs].to(device), mesh, 1)
        parallelize_module(layer, mesh, plan)


def own_heads(transformer: Transformer) -> Transformer:
    """A transformer of this rank's heads alone, whose weights are the parts that :func:`shard` has left.

    Of each layer it computes this rank's share of a sum over the ranks.
    """
    config, expert = transformer.config, _experts(transformer.layers[0])[0]
    state = {
        name: weight.to_local() if isinstance(weight, DTensor) else weight
        for name, weight in transformer.state_dict().items()
    }
    heads = int(expert.o_proj.weight.to_local().shape[1]) // config.head_dim
    kv_heads, inner = heads // expert.queries_per_key, int(expert.mlp.down_proj.weight.to_local().shape[1])
    with torch.device("meta"):
        own = Transformer(dataclasses.replace(config, num_heads=heads, num_kv_heads=kv_heads, intermediate_size=inner))
    for name, module in transformer.named_modules():
        if isinstance(module, LeftOut):
            own.set_submodule(name, LeftOut())
    own.load_state_dict(state, assign=True)
    return own


def _experts(layer: Any) -> list[Any]:
    """Those of a layer that were not left out."""
    return [expert for expert in (layer.gen, layer.und) if not isinstance(expert, LeftOut)]


def _part(size: int, rank: int, ranks: int) -> Tensor:
    """A rank's part of ``size`` indices."""
    return torch.arange(size).view(ranks, -1)[rank]


def _qkv_rows(config: LanguageConfig, kv_heads: slice, rank: int, ranks: int) -> Tensor:
    """A rank's rows of a packed ``qkv_proj``: its queries', keys' and values'."""
    heads = torch.arange((config.num_heads + 2 * config.num_kv_heads) * config.head_dim).view(-1, config.head_dim)
    query, key, value = heads.split((config.num_heads, config.num_kv_heads, config.num_kv_heads))
    return torch.cat((query.chunk(ranks)[rank], key[kv_heads], value[kv_heads])).flatten()


def _own(part: Tensor, mesh: DeviceMesh, dim: int) -> nn.Parameter:
    """A rank's ``part`` of a weight that is cut along ``dim``."""
    return nn.Parameter(DTensor.from_local(part.contiguous(), mesh, [Shard(dim)], run_check=False), requires_grad=False)
