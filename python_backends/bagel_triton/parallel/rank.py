"""One rank's share of the transformer, the same on rank 0 and on the others, and the process group that they are in."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import FileStore

from bagel_triton.model.bagel import Bagel
from bagel_triton.model.cpu.thread_pool import ThreadPool
from bagel_triton.model.device import forward_on
from bagel_triton.model.mot import PackedBatch
from bagel_triton.parallel.sizes import Sizes

SELFTEST_BYTES = 1 << 20
# Ranks are processes of one host; gloo would else listen at the address of the host's name.
INTERFACE_VARIABLE, LOOPBACK = "GLOO_SOCKET_IFNAME", "lo"


def join(meeting: Path, rank: int, ranks: int, timeout_s: float) -> None:
    """Join the process group that meets at the file ``meeting``; a collective fails after ``timeout_s`` seconds."""
    os.environ.setdefault(INTERFACE_VARIABLE, LOOPBACK)
    store = FileStore(str(meeting), ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=timeout_s))


def selftest() -> dict[str, float]:
    """Try what ranks do with one another, on all of them at once; milliseconds by name, for a MiB.

    Raises:
        RuntimeError: the sum is not right, or a rank has ended.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    data = torch.full((SELFTEST_BYTES // 4,), float(rank + 1))
    found: dict[str, float] = {}
    for name in ("all_reduce", "send"):
        dist.barrier()
        started = time.perf_counter()
        if name == "all_reduce":
            dist.all_reduce(data)
        elif rank:
            receive(data, 0)
        else:
            for other in range(1, ranks):
                send(data, other)
        found[name] = (time.perf_counter() - started) * 1e3
    if float(data[-1]) != ranks * (ranks + 1) / 2:
        raise RuntimeError(f"the ranks' sum is {float(data[-1])}, not {ranks * (ranks + 1) / 2}")
    return found


def send(x: Tensor, rank: int) -> None:
    """Send a tensor of any dtype; the other rank knows its shape."""
    if x.numel():
        dist.send(x.contiguous().view(torch.uint8), rank)


def receive(x: Tensor, rank: int) -> Tensor:
    """Fill the contiguous ``x`` with what ``rank`` sends; returns it."""
    if x.numel():
        dist.recv(x.view(torch.uint8), rank)
    return x


class RankModel:
    """A rank's share of the transformer, in a process group that has been joined."""

    def __init__(self, model: Bagel, sizes: Sizes, pool: ThreadPool) -> None:
        self.sizes, self.place = sizes, sizes.place(dist.get_rank())
        self.device, self.dtype = model.device, model.dtype
        self.config = model.config.language
        transformer = model.language_model.model
        if sizes.tensor > 1:
            from torch.distributed.device_mesh import init_device_mesh

            from bagel_triton.parallel.tensor import shard

            mesh = init_device_mesh(model.device.type, sizes, mesh_dim_names=sizes._fields)
            shard(transformer, mesh["tensor"])
            self._forward: Any = transformer
        else:
            self._forward = forward_on(model.device, transformer, pool)

    def kv_heads(self, rank: int) -> slice:
        """The KV heads that ``rank`` keeps of each context."""
        if self.sizes.tensor == 1:
            return slice(0, self.config.num_kv_heads)
        from bagel_triton.parallel.tensor import kv_heads_of

        return kv_heads_of(self.config, self.sizes.place(rank).tensor, self.sizes.tensor)

    def own_heads(self, store: Tensor) -> Tensor:
        """This rank's heads of a store [layers, 2, slots, kv_heads, head_dim], a view."""
        return store[:, :, :, self.kv_heads(dist.get_rank())]

    def forward(self, embeddings: Tensor, batch: PackedBatch, kv: Any) -> Tensor:
        """Hidden states before the final norm, [tokens, hidden], of a batch whose stores hold this rank's heads."""
        return self._forward(embeddings, batch, kv)  # type: ignore[no-any-return]
