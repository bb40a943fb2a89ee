"""Rank 0 of a stage and the ranks that it drives: one owner of their lives, one order of their work.

Rank 0 is the stage's own process. It starts the others, and each forward goes out to them as a message and tensors.
The ranks have no state of requests: their heads of the thinker's KV cache, the DiT's stores of keys and values,
which rank 0 numbers, and one layout.

A rank that ends is the stage's end: ``lost`` is called, the forward in flight fails with ``StageUnavailable``, the
process exits, and what replaces it starts a new group. The other ranks end when rank 0's sockets close.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future
from typing import Self, TypeVar

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d as c10d

from bagel_triton.deploy.config import DeployConfig
from bagel_triton.kv.block_pool import KVCachePool
from bagel_triton.kv.store import PagedStep, WorkspaceStep, runs_of
from bagel_triton.model.autoencoder import Autoencoder
from bagel_triton.model.bagel import Bagel
from bagel_triton.model.cpu.thread_pool import ThreadPool
from bagel_triton.model.device import on_gpu, resolve
from bagel_triton.model.mot import PackedBatch
from bagel_triton.parallel import messages
from bagel_triton.parallel.launch import LOOPBACK, Rank, RankProcess
from bagel_triton.parallel.layout import NOTHING, Part, PoolLayout, StoresLayout, by_sequence, parts_of
from bagel_triton.parallel.messages import (
    Arrange,
    Attach,
    Collect,
    Copy,
    Decode,
    Forward,
    Free,
    Keep,
    Meet,
    Message,
    Ready,
    Start,
)
from bagel_triton.parallel.patches import RankDecoder
from bagel_triton.parallel.rank import Arranged, RankModel, join, meet, receive, selftest, send
from bagel_triton.parallel.sizes import Sizes
from bagel_triton.protocol.errors import StageUnavailable

STOP_S = 5.0
OWN_GPU = "cuda:0"  # of a Ray actor, which sees no other
log = logging.getLogger(__name__)
Value = TypeVar("Value")


class RankGroup:
    """The ranks of a stage; build it with :meth:`start`.

    Threads: one forward or change of stores at a time; two engines of one process may share a group.
    """

    def __init__(self, stage: str, ranks: Sequence[Rank], device: torch.device, threads: int) -> None:
        self._stage, self._ranks, self._device = stage, ranks, device
        self._threads_before = torch.get_num_threads()
        torch.set_num_threads(threads)
        self._pool = ThreadPool.of(device)
        self._closing, self._ended = threading.Event(), threading.Event()
        self._lost: list[Callable[[], None]] = []
        self._lock = threading.Lock()
        self._users = 0
        self._model: RankModel
        self._decoder: RankDecoder
        self._cache: Tensor | None = None  # rank 0's heads of the thinker's
        self._pool_store: Tensor
        self._block_tokens: int
        self._numbers: dict[int, int] = {}  # of stores, by the id of rank 0's
        self._newest = 0
        self._arranged: PagedStep | WorkspaceStep | None = None
        self._parts: list[Part] = []
        self._own: Arranged | None = None
        for number in self._others:
            threading.Thread(target=self._watch, args=(number,), name=f"rank-{number}", daemon=True).start()

    @classmethod
    def start(
        cls,
        config: DeployConfig,
        stage: str,
        model: Bagel | None,
        share: bool,
        autoencoder: Autoencoder | None = None,
    ) -> Self:
        """Start the other ranks of the Triton model ``stage``, and make ``model`` rank 0's share.

        They load ``model``'s checkpoint; with ``share`` those of this host map the server's shared weights. With an
        ``autoencoder`` they also decode images; those of the decoder have no ``model``.

        Raises:
            RuntimeError: a rank could not be started, or ended before it was ready; its own log says why.
        """
        sizes, timeout_s = Sizes.of(config, stage), config.bagel.stage_timeout_s
        device = resolve(config.device_of(stage), config.dtype).torch_device
        if config.device == "auto":
            config = msgspec.structs.replace(config, device=str(device))
        devices = [config.rank_device_of(stage, number) for number in range(sizes.ranks)]
        # Each has its part of the threads that this process would have.
        threads = max(torch.get_num_threads() // sizes.ranks, 1)
        ranks: Sequence[Rank]
        if config.worker_backend == "ray":
            from bagel_triton.parallel.actors import start_actors

            host, ranks = start_actors(config.ray_address, sizes.ranks - 1, on_gpu(device))
            devices[1:] = [OWN_GPU if on_gpu(device) else devices[0]] * len(ranks)
        else:
            host, ranks = LOOPBACK, [RankProcess.start() for _ in range(1, sizes.ranks)]
        group = cls(stage, ranks, device, threads)
        try:
            for number, rank in enumerate(ranks, start=1):
                shared, decodes = share and rank.is_here, autoencoder is not None
                group._send(number, Start(config, stage, number, devices[number], threads, shared, decodes))
            for number, rank in enumerate(ranks, start=1):
                if not isinstance(messages.read(rank.connection), Ready):
                    raise RuntimeError(f"rank {number} of {sizes.ranks}, {rank}, ended before it had its weights")
            store = meet(host, sizes.ranks, timeout_s)
            for number in group._others:
                group._send(number, Meet(host, store.port))

            def build() -> dict[str, float]:
                join(store, host, device, 0, sizes.ranks, timeout_s)
                times = selftest(device)
                if model is not None:
                    group._model = RankModel(model, sizes, group._pool, device)
                if autoencoder is not None:
                    patches = config.vae_decode.patch_parallel_size
                    group._decoder = RankDecoder(autoencoder.decoder, patches, group._pool)
                return times

            times = group._while_all_live(build)
        except BaseException:
            group.stop()
            raise
        tried = ", ".join(f"{name} of 1 MiB {milliseconds:.2f} ms" for name, milliseconds in times.items())
        others = ", ".join(f"rank {number} is {rank}" for number, rank in enumerate(ranks, start=1))
        log.info("%s: mesh [%s] by %s at %s; %s; %s", stage, sizes, dist.get_backend(), host, others, tried)
        return group

    def join(self, lost: Callable[[], None]) -> None:
        """Use the group for an engine, until it calls :meth:`close`; ``lost`` is called once a rank has ended."""
        self._users += 1
        self._lost.append(lost)
        if self._ended.is_set():
            lost()

    @property
    def stores(self) -> int:
        """Stores that the ranks have."""
        return len(self._numbers)

    def attach(self, pool: KVCachePool) -> None:
        """Let every rank keep its heads of the thinker's KV cache ``pool``; rank 0 writes its own there.

        The other ranks' heads come when a context is lent: see :meth:`collect`.
        """
        self._pool_store, self._block_tokens = pool.store, pool.geometry.block_tokens
        self._cache = self._model.own_heads(pool.store)
        pool.copied = self._copied
        with self._together():
            for rank in self._others:
                slots = pool.capacity if rank in self._prefilling else 0
                self._send(rank, Attach(slots, pool.geometry))

    def collect(self, blocks: Collection[int]) -> None:
        """Copy the other ranks' heads of ``blocks`` to the KV cache that was attached.

        Raises:
            StageUnavailable: a rank has ended.
        """
        store, size = self._pool_store, self._block_tokens
        runs = runs_of(sorted(blocks), len(blocks) * size, size)
        tokens = sum(run.stop - run.start for run in runs)
        found = {self._model.heads.start}  # where there are fewer KV heads than ranks, several have the same ones
        with self._together():
            for rank in self._prefilling[1:]:
                heads = self._model.kv_heads(rank)
                if heads.start in found:
                    continue
                found.add(heads.start)
                self._send(rank, Collect(tuple((run.start, run.stop) for run in runs)))
                theirs = store.new_empty(*store.shape[:2], tokens, heads.stop - heads.start, store.shape[4])
                receive(theirs, rank)
                for run, part in zip(runs, theirs.split([run.stop - run.start for run in runs], dim=2), strict=True):
                    store[:, :, run, heads] = part

    def keep(self, store: Tensor, past: int) -> Tensor:
        """Give every rank its heads of ``store``, [layers, 2, slots, kv_heads, head_dim]; returns rank 0's.

        The first ``past`` slots are filled. The ranks' parts live until the returned one is given to :meth:`free`.

        Raises:
            StageUnavailable: a rank has ended.
        """
        with self._together():
            self._newest += 1
            for rank in self._others:
                own = store[:, :, :, self._model.kv_heads(rank)]
                self._send(rank, Keep(self._newest, tuple(own.shape), past))
                send(own[:, :, :past], rank)
        kept = self._model.own_heads(store).contiguous()
        self._numbers[id(kept)] = self._newest
        return kept

    def free(self, stores: Sequence[Tensor]) -> None:
        """Forget stores that :meth:`keep` returned, on all ranks."""
        numbers = tuple(self._numbers.pop(id(store)) for store in stores)
        with contextlib.suppress(StageUnavailable), self._together():
            self._arranged = self._own = None
            for rank in self._others:
                self._send(rank, Free(numbers))

    def forward(self, embeddings: Tensor, batch: PackedBatch, kv: PagedStep | WorkspaceStep) -> Tensor:
        """Hidden states of the rows that are wanted, [tokens, hidden].

        ``kv`` reads and writes the KV cache that was attached, or stores that were kept.

        Raises:
            StageUnavailable: a rank has ended.
        """
        with self._together():
            if kv is not self._arranged:
                self._arrange(batch, kv)
            shards = self._model.sizes.shard
            others = [
                (rank, part) for rank, part in enumerate(self._parts) if rank and (part.layout.tokens or shards > 1)
            ]
            for rank, part in others:
                self._send(rank, Forward())
                send(part.of(embeddings), rank)
            first, own = self._parts[0], self._own
            assert own is not None, "set with the parts"
            hidden = self._model.forward(first.of(embeddings), own)
            if first.returned is None:
                return hidden
            out = torch.empty_like(embeddings)
            out[first.returned] = hidden[own.wanted]
            for rank, part in others:
                if (rows := part.returned) is not None:
                    out[rows] = receive(embeddings.new_empty(len(rows), embeddings.shape[1]), rank)
            return out

    def decode(self, z: Tensor) -> Tensor:
        """The decoder's pixels of ``z`` [batch, latent_channels, height, width]: [batch, 3, 8 * height, 8 * width].

        Raises:
            StageUnavailable: a rank has ended.
        """
        if z.shape[2] < self._decoder.ranks:
            return self._decoder.alone(z)
        with self._together():
            batch, channels, height, width = z.shape
            for rank in range(1, self._decoder.ranks):
                self._send(rank, Decode((batch, channels, height, width)))
                send(z, rank)
            return self._decoder.decode(z)

    def close(self) -> None:
        """End the other ranks, once every engine that has joined is closed."""
        self._users -= 1
        if self._users <= 0:
            self.stop()

    def stop(self) -> None:
        """End the other ranks now, even while they are in use."""
        if on_gpu(self._device):  # its queue waits for the other ranks' part
            with contextlib.suppress(RuntimeError):
                self._while_all_live(lambda: torch.cuda.synchronize(self._device))
        self._closing.set()
        for rank in self._ranks:
            rank.close()
        for rank in self._ranks:
            rank.reap(STOP_S)
        if not dist.is_initialized():  # a start that failed counted a group, and the next ranks would count none
            c10d._world.group_count = 0
        elif dist.get_backend() == dist.Backend.NCCL:  # its orderly end needs all ranks, and these are gone
            c10d._abort_process_group()
        else:
            dist.destroy_process_group()
        self._pool.close()
        torch.set_num_threads(self._threads_before)

    def _while_all_live(self, work: Callable[[], Value]) -> Value:
        """The result of ``work``, which waits for all ranks: NCCL would wait for ever for one that has ended.

        Raises:
            RuntimeError: a rank has ended, and ``work`` is left to itself.
        """
        found, either = Future[Value](), threading.Event()

        def run() -> None:
            try:
                found.set_result(work())
            except BaseException as error:
                found.set_exception(error)
            either.set()

        self._lost.append(either.set)
        if not self._ended.is_set():
            threading.Thread(target=run, name=f"{self._stage}-ranks", daemon=True).start()
            either.wait()
        self._lost.remove(either.set)
        if not found.done():
            raise RuntimeError(f"a rank of the {self._stage} has ended; its own log says why")
        return found.result()

    @property
    def _others(self) -> range:
        return range(1, len(self._ranks) + 1)

    @property
    def _prefilling(self) -> range:
        """The ranks that compute the thinker's forwards; the DiT's other groups of sequences do not."""
        sizes = self._model.sizes
        return range(sizes.tensor * sizes.ulysses)

    def _copied(self, source: slice, target: slice) -> None:
        with self._together():
            for rank in self._prefilling[1:]:
                self._send(rank, Copy((source.start, source.stop), (target.start, target.stop)))

    def _arrange(self, batch: PackedBatch, kv: PagedStep | WorkspaceStep) -> None:
        """Send each rank its part of a new layout."""
        layouts: list[tuple[PoolLayout | StoresLayout, Tensor | None]]
        own: PagedStep | WorkspaceStep
        sizes = self._model.sizes
        if isinstance(kv, PagedStep):
            assert self._cache is not None, "attached before"
            layouts = [(PoolLayout.of(batch, kv), None)]
            layouts += [(NOTHING, torch.empty(0, dtype=torch.int64))] * (sizes.cfg - 1)
            own = PoolLayout.of(batch, kv).kv(self._cache)
        else:
            stores = [self._numbers[id(store)] for store in kv.stores]
            layout = StoresLayout.of(batch, kv, stores)
            layouts = [(layout, None)] if sizes.cfg == 1 else [*by_sequence(layout, sizes.cfg)]
            first = layouts[0][0]
            assert isinstance(first, StoresLayout), "as it was made"
            own = first.kv(dict(zip(stores, kv.stores, strict=True)))
        self._parts = [part.on(self._device) for part in parts_of(layouts, sizes)]
        for rank, part in enumerate(self._parts):
            cos, sin = part.of(batch.cos), part.of(batch.sin)
            if rank:
                self._send(rank, Arrange(part.layout, returns=part.returned is not None))
                send(torch.stack((cos, sin)), rank)
            else:
                self._own = self._model.arranged(part.layout, cos, sin, own)
        self._arranged = kv

    @contextlib.contextmanager
    def _together(self) -> Iterator[None]:
        """Work of all ranks: where it fails midway they are out of step, and the group is of no use."""
        with self._lock:
            if self._ended.is_set():
                raise StageUnavailable(f"a rank of the {self._stage} has ended; the stage starts again")
            try:
                yield
            except Exception as error:
                log.exception("%s: the ranks are out of step", self._stage)
                self._end()
                raise StageUnavailable(f"a rank of the {self._stage} has ended; the stage starts again") from error

    def _send(self, rank: int, message: Message) -> None:
        messages.write(self._ranks[rank - 1].connection, message)

    def _watch(self, number: int) -> None:
        rank = self._ranks[number - 1]
        how = rank.wait()
        if not self._closing.is_set():
            log.error("%s: rank %d, %s, %s", self._stage, number, rank, how)
            self._end()

    def _end(self) -> None:
        self._ended.set()
        for lost in list(self._lost):
            lost()
