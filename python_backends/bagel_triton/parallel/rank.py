"""One rank's share of the transformer, the same on rank 0 and on the others, and the process group that they are in."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import Store, TCPStore

from bagel_triton.model.attention import StepKV, attention_kernel
from bagel_triton.model.bagel import Bagel
from bagel_triton.model.cpu.thread_pool import ThreadPool
from bagel_triton.model.device import forward_on, wait_for_stream
from bagel_triton.model.mot import PackedBatch, Reduce, Transformer
from bagel_triton.parallel.layout import PoolLayout, Share, StoresLayout
from bagel_triton.parallel.sizes import Sizes, kv_heads_of
from bagel_triton.parallel.ulysses import UlyssesKV

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

SELFTEST_BYTES = 1 << 20
# NCCL takes a name for a prefix, unless it begins with "=".
INTERFACE_VARIABLES = {"GLOO_SOCKET_IFNAME": "{}", "NCCL_SOCKET_IFNAME": "={}"}
# torch warns where a process sends by the communicator of its collectives; here their order is one, so it is wanted.
SERIAL_WARNING = "TORCH_NCCL_SHOW_EAGER_INIT_P2P_SERIALIZATION_WARNING"
SIOCGIFADDR = 0x8915  # of Linux: an interface's IPv4 address


def listen(host: str) -> socket.socket:
    """A socket that listens at any port of ``host``, an IPv4 address of this machine, and nowhere else."""
    listening = socket.socket()
    listening.bind((host, 0))
    listening.listen()
    return listening


def meet(host: str, ranks: int, timeout_s: float) -> TCPStore:
    """Open a store for ``ranks`` to meet at, at any port of rank 0's address ``host``; it ends with this process."""
    timeout = timedelta(seconds=timeout_s)
    listening = listen(host)
    port = listening.getsockname()[1]
    # torch's own socket would listen at every address.
    return TCPStore(host, port, ranks, True, timeout, wait_for_workers=False, master_listen_fd=listening.detach())


def join(store: Store, host: str, device: torch.device, rank: int, ranks: int, timeout_s: float) -> None:
    """Join the process group that meets at ``store``; a collective fails after ``timeout_s`` seconds.

    ``host`` is this rank's own address: gloo would else listen at the address of the host's name, and NCCL at all.
    """
    if (interface := interface_of(host)) is not None:
        for variable, form in INTERFACE_VARIABLES.items():
            os.environ.setdefault(variable, form.format(interface))
    os.environ.setdefault(SERIAL_WARNING, "false")
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=store,
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=timeout_s),
        device_id=device if on_gpu else None,
    )


def interface_of(host: str) -> str | None:
    """The network interface whose IPv4 address is ``host``; None where none is."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # one without an IPv4 address
                found = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", name.encode()))
                if socket.inet_ntoa(found[20:24]) == host:
                    return name
    return None


def selftest(device: torch.device) -> dict[str, float]:
    """Try what ranks on ``device`` do with one another, on all of them at once; milliseconds by name, for a MiB.

    Raises:
        RuntimeError: a result is not right, or a rank has ended.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    part = SELFTEST_BYTES // 4 // ranks
    numbers = torch.arange(1.0, ranks + 1, device=device)
    own = numbers[rank].repeat(part * ranks)
    summed, gathered, exchanged, sent = own.clone(), torch.zeros_like(own), torch.zeros_like(own), own.clone()

    def send_all() -> None:
        if rank:
            receive(sent, 0)
        else:
            for other in range(1, ranks):
                send(sent, other)

    tried: dict[str, tuple[Callable[[], Any], Tensor, Tensor]] = {
        "all_reduce": (lambda: dist.all_reduce(summed), summed, numbers.sum().expand(ranks)),
        "all_gather": (lambda: dist.all_gather([*gathered.split(part)], own[:part]), gathered, numbers),
        "all_to_all": (lambda: dist.all_to_all_single(exchanged, own), exchanged, numbers),
        "send": (send_all, sent, numbers[0].expand(ranks)),
    }
    found: dict[str, float] = {}
    for name, (run, result, expected) in tried.items():
        dist.barrier()
        started = time.perf_counter()
        run()
        wait_for_stream(device)
        found[name] = (time.perf_counter() - started) * 1e3
        if not torch.equal(result, expected.repeat_interleave(part)):
            raise RuntimeError(f"the self-test of the ranks' {name} gave {result[::part].tolist()}")
    return found


def _plainly(transformer: Transformer, pool: ThreadPool, embeddings: Tensor, batch: PackedBatch, kv: StepKV) -> Tensor:
    """The plain modules' forward, with all threads in each operation."""
    return pool.run_with_intraop_threads(lambda: transformer(embeddings, batch, kv))  # type: ignore[no-any-return]


def send(x: Tensor, rank: int) -> None:
    """Send a tensor of any dtype; the other rank knows its shape."""
    if x.numel():
        dist.send(x.contiguous().view(torch.uint8), rank)


def receive(x: Tensor, rank: int) -> Tensor:
    """Fill the contiguous ``x`` with what ``rank`` sends; returns it."""
    if x.numel():
        dist.recv(x.view(torch.uint8), rank)
    return x


@dataclass(frozen=True)
class Arranged:
    """A rank's rows of a forward, their keys and values, and which of the rows are ``wanted``."""

    batch: PackedBatch
    kv: Any
    wanted: slice


def _sum_over(group: dist.ProcessGroup) -> Reduce:
    def reduce(x: Tensor) -> None:
        dist.all_reduce(x, group=group)

    return reduce


def _move(model: nn.Module, device: torch.device) -> None:
    """Move what is not on ``device``, in place; torch's own ``to`` would also visit weights that are cut."""
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            if weight.device != device:
                setattr(module, name, nn.Parameter(weight.to(device), requires_grad=False))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, buffer.to(device))


def _mesh(device: torch.device, **sizes: int) -> DeviceMesh:
    """All ranks in dimensions of these names and ``sizes``; those of one rank are left out.

    A group of one would be a communicator on a GPU, with buffers.
    """
    from torch.distributed.device_mesh import init_device_mesh

    shape = {name: size for name, size in sizes.items() if size > 1}
    return init_device_mesh(device.type, (*shape.values(),), mesh_dim_names=(*shape,))


class RankModel:
    """A rank's share of the transformer, in a process group that has been joined.

    A ``model`` that is cut may be on the host: the rank's part of it goes to ``device``, the rest nowhere.
    """

    def __init__(self, model: Bagel, sizes: Sizes, pool: ThreadPool, device: torch.device) -> None:
        self.sizes, self.place = sizes, sizes.place(dist.get_rank())
        self.device, self.dtype = device, model.dtype
        self.config = model.config.language
        attention_kernel(device, model.dtype)  # which switches off cuDNN's, as in an engine's process
        transformer = model.language_model.model
        self._forward: Any = partial(_plainly, transformer, pool)
        self._group: dist.ProcessGroup | None = None  # of the ranks that share rows
        if sizes.tensor * sizes.ulysses * sizes.shard == 1:
            self._forward = forward_on(device, transformer, pool)
            return
        mesh = _mesh(device, cfg=sizes.cfg, ulysses=sizes.ulysses, tensor=sizes.tensor)
        if sizes.shard > 1:
            from bagel_triton.parallel import hsdp

            hsdp.shard(transformer, _mesh(device, replicate=sizes.ranks // sizes.shard, shard=sizes.shard))
        if sizes.ulysses > 1:
            self._group = mesh["ulysses"].get_group()
        if sizes.tensor > 1:
            from bagel_triton.parallel.tensor import own_heads, shard

            shard(transformer, mesh["tensor"], device)
        _move(model, device)
        if sizes.ulysses * sizes.shard == 1:
            self._forward = forward_on(device, own_heads(transformer), pool, _sum_over(mesh["tensor"].get_group()))

    def kv_heads(self, rank: int) -> slice:
        """The KV heads that ``rank`` keeps of each context."""
        place = self.sizes.place(rank)
        return self._kv_heads(place.tensor, place.ulysses)

    def _kv_heads(self, tensor: int, ulysses: int) -> slice:
        return kv_heads_of(self.config, tensor * self.sizes.ulysses + ulysses, self.sizes.tensor * self.sizes.ulysses)

    def rows(self, layout: PoolLayout | StoresLayout) -> int:
        """How many rows of ``layout`` this rank has."""
        return len(Share.all_of(layout, self.sizes.ulysses)[self.place.ulysses].rows)

    def arranged(self, layout: PoolLayout | StoresLayout, cos: Tensor, sin: Tensor, kv: StepKV) -> Arranged:
        """This rank's rows of ``layout``, whose keys and values are ``kv``; the rotary tables are those rows'."""
        if self._group is None:
            batch = layout.batch(cos, sin)
            return Arranged(batch, kv, batch.wanted or slice(0, batch.tokens))
        shares = Share.all_of(layout, self.sizes.ulysses)
        own, place = shares[self.place.ulysses], self.place
        per_rank = self.config.num_heads // (self.sizes.tensor * self.sizes.ulysses)
        heads = [slice(start, start + per_rank) for start in range(0, per_rank * self.sizes.ulysses, per_rank)]
        kv_heads = [self._kv_heads(place.tensor, number) for number in range(self.sizes.ulysses)]
        first = kv_heads[0].start  # of those that this rank computes
        kv_heads = [slice(part.start - first, part.stop - first) for part in kv_heads]
        exchanged = UlyssesKV(kv, [share.rows.to(self.device) for share in shares], heads, kv_heads, self._group)
        return Arranged(PackedBatch(own.gen_rows, cos, sin), exchanged, own.wanted)

    def own_heads(self, store: Tensor) -> Tensor:
        """This rank's heads of a store [layers, 2, slots, kv_heads, head_dim], a view."""
        return store[:, :, :, self.heads]

    @property
    def heads(self) -> slice:
        """The KV heads that this rank keeps."""
        return self.kv_heads(dist.get_rank())

    def forward(self, embeddings: Tensor, arranged: Arranged) -> Tensor:
        """Hidden states before the final norm, [rows, hidden], of this rank's rows."""
        if len(embeddings) or self.sizes.shard > 1:  # all ranks gather each layer's weights
            return self._forward(embeddings, arranged.batch, arranged.kv)  # type: ignore[no-any-return]
        # Without rows it has heads still.
        query_heads = self.config.num_heads // self.sizes.tensor
        kv_heads = max(self.config.num_kv_heads // self.sizes.tensor, 1)
        query, key = (embeddings.new_empty(0, heads, self.config.head_dim) for heads in (query_heads, kv_heads))
        for layer in range(self.config.num_layers):
            arranged.kv.write(layer, key, key)
            arranged.kv.attend(layer, query)
        return embeddings
