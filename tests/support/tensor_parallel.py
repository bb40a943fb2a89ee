"""One rank of a tensor-parallel transformer, sharded from outside by torch's own means."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from bagel_triton.model.mot import Layer
from bagel_triton.weights.checkpoint import Checkpoint
from tests.support.batches import make_batch, sequence

CPU = torch.device("cpu")


def by_rank(packed: Tensor, sizes: Sequence[int], ranks: int) -> nn.Parameter:
    """Rows of a packed weight in the ranks' order, each rank's share of every part together."""
    parts = [part.chunk(ranks) for part in packed.split(list(sizes))]
    return nn.Parameter(torch.cat([part[rank] for rank in range(ranks) for part in parts]), requires_grad=False)


def run_rank(rank: int, ranks: int, checkpoint: Path, folder: Path) -> None:
    """Save rank 0's hidden states as ``sharded.pt``, and those of the unsharded model as ``plain.pt``."""
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=ranks)
    try:
        bagel = Checkpoint(checkpoint).load_bagel(CPU, torch.float32)
        config, transformer = bagel.config.language, bagel.language_model.model
        sequences = [sequence(bagel, 37, 2, 0), sequence(bagel, 9, 5, 1)]
        with torch.no_grad():
            plain = transformer(*make_batch(bagel, sequences))
        sizes = [heads * config.head_dim for heads in (config.num_heads, config.num_kv_heads, config.num_kv_heads)]
        plan: dict[str, ParallelStyle] = {}
        for name in ("gen", "und"):
            plan |= {f"{name}.{column}": ColwiseParallel() for column in ("qkv_proj", "mlp.gate_up_proj")}
            plan |= {f"{name}.{row}": RowwiseParallel() for row in ("o_proj", "mlp.down_proj")}
        layers: list[Layer] = list(transformer.layers)  # type: ignore[arg-type]
        for layer in layers:
            for expert in (layer.gen, layer.und):
                qkv, gate_up = expert.qkv_proj, expert.mlp.gate_up_proj
                qkv.weight, qkv.bias = by_rank(qkv.weight, sizes, ranks), by_rank(qkv.bias, sizes, ranks)
                gate_up.weight = by_rank(gate_up.weight, [config.intermediate_size] * 2, ranks)
            parallelize_module(layer, init_device_mesh("cpu", (ranks,)), plan)
        with torch.no_grad():
            sharded = transformer(*make_batch(bagel, sequences))
        if rank == 0:
            torch.save(plain, folder / "plain.pt")
            torch.save(sharded, folder / "sharded.pt")
    finally:
        dist.destroy_process_group()
