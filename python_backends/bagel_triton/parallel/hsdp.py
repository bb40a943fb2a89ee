"""Sharded weights of the plain transformer by torch's own means (HSDP): a rank keeps a part of every layer.

A layer is whole only while it is computed, and the next one is gathered meanwhile. Each rank computes what is its own
of a forward, so all ranks of a group run the same layers in the same order, with or without rows.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from bagel_triton.model.mot import Transformer


def shard(transformer: Transformer, mesh: DeviceMesh) -> None:
    """Keep this rank's part of every layer's weights, in place; nothing is sent.

    ``mesh`` is shards, or replicas times shards. Embedding, norms and vocabulary head stay whole.
    """
    layers: list[Any] = list(transformer.layers)
    in_layers = {id(weight) for weight in transformer.layers.parameters()}
    whole = {weight for weight in transformer.parameters() if id(weight) not in in_layers}
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(transformer, mesh=mesh, ignored_params=whole)
    for layer, following in pairwise(layers):
        layer.set_modules_to_forward_prefetch([following])
