"""Rank 0 of a stage and the ranks that it drives: one owner of their lives, one order of their work.

Rank 0 is the stage's own process. It starts the others on this host, and each forward goes out to them as a message
and tensors. The ranks have no state of requests: stores of keys and values that rank 0 numbers, and one layout.

A rank that ends is the stage's end: ``lost`` is called, the forward in flight fails with ``StageUnavailable``, the
process exits, and what replaces it starts a new group. The other ranks end when rank 0's pipes close.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Self

import torch
import torch.distributed as dist
from torch import Tensor

from bagel_triton.deploy.config import DeployConfig
from bagel_triton.ipc.shm import SHM_DIRECTORY
from bagel_triton.kv.store import WorkspaceStep
from bagel_triton.model.bagel import Bagel
from bagel_triton.model.cpu.thread_pool import ThreadPool
from bagel_triton.model.mot import PackedBatch
from bagel_triton.parallel import messages
from bagel_triton.parallel.layout import Part, by_sequence, whole
from bagel_triton.parallel.messages import Arrange, Forward, Free, Keep, Meet, Message, Start
from bagel_triton.parallel.rank import RankModel, join, receive, selftest, send
from bagel_triton.parallel.worker import READY
from bagel_triton.protocol.errors import StageUnavailable

STOP_S = 5.0
log = logging.getLogger(__name__)


class RankGroup:
    """The ranks of the DiT; build it with :meth:`start`. From the engine's thread, but for ``close``."""

    def __init__(self, config: DeployConfig, processes: list[subprocess.Popen[bytes]], threads: int) -> None:
        self._config, self._processes = config, processes
        self.pool, self._threads_before = ThreadPool(threads), torch.get_num_threads()
        torch.set_num_threads(threads)
        self._closing, self._ended = threading.Event(), threading.Event()
        self._lost: Callable[[], None] = lambda: None
        self._model: RankModel
        self._numbers: dict[int, int] = {}  # of stores, by the id of rank 0's
        self._newest = 0
        self._arranged: WorkspaceStep | None = None
        self._parts: list[Part] = []
        self._own: tuple[PackedBatch, WorkspaceStep] | None = None
        for rank, process in enumerate(processes, start=1):
            threading.Thread(target=self._watch, args=(rank, process), name=f"rank-{rank}", daemon=True).start()

    @classmethod
    def start(cls, config: DeployConfig, model: Bagel, share: bool) -> Self:
        """Start the other ranks, which load ``model``'s checkpoint, and make ``model`` rank 0's share.

        With ``share`` they map the server's shared weights.

        Raises:
            RuntimeError: a rank ended before it was ready; its own log says why.
        """
        ranks = config.dit.ranks
        meeting = SHM_DIRECTORY / f"{config.shm_prefix}_ranks_{secrets.token_hex(4)}"
        python = sys.executable or shutil.which("python3") or "python3"  # of Triton's stub, that on its PATH
        command = [python, "-P", "-m", "bagel_triton.parallel.worker"]
        processes = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(1, ranks)]
        # Each has its part of the threads that this process would have.
        threads = max(torch.get_num_threads() // ranks, 1)
        group = cls(config, processes, threads)
        try:
            for rank in range(1, ranks):
                group._send(rank, Start(config, rank, ranks, str(meeting), threads, share))
            for rank, process in enumerate(processes, start=1):
                assert process.stdout is not None, "a pipe"
                if process.stdout.readline() != READY:
                    raise RuntimeError(f"rank {rank} of {ranks} ended before it had its weights")
            for rank in range(1, ranks):
                group._send(rank, Meet())
            join(meeting, 0, ranks, config.bagel.stage_timeout_s)
            times = selftest()
            group._model = RankModel(model, config.dit, group.pool)
        except BaseException:
            group.close()
            raise
        finally:
            meeting.unlink(missing_ok=True)
        kind = "tensor" if config.dit.tensor_parallel_size > 1 else "cfg"
        tried = ", ".join(f"{name} of 1 MiB {milliseconds:.2f} ms" for name, milliseconds in times.items())
        pids = ", ".join(str(process.pid) for process in processes)
        log.info("dit: mesh [%s=%d] by gloo, ranks 1 to %d are processes %s; %s", kind, ranks, ranks - 1, pids, tried)
        return group

    def when_lost(self, lost: Callable[[], None]) -> None:
        """Call ``lost`` once a rank has ended, from any thread."""
        self._lost = lost
        if self._ended.is_set():
            lost()

    @property
    def stores(self) -> int:
        """Stores that the ranks have."""
        return len(self._numbers)

    def keep(self, store: Tensor, past: int) -> Tensor:
        """Give every rank its heads of ``store``, [layers, 2, slots, kv_heads, head_dim]; returns rank 0's.

        The first ``past`` slots are filled. The ranks' parts live until the returned one is given to :meth:`free`.

        Raises:
            StageUnavailable: a rank has ended.
        """
        with self._together():
            self._newest += 1
            for rank in range(1, self._model.ranks):
                own = store[:, :, :, self._model.kv_heads(rank)]
                self._send(rank, Keep(self._newest, tuple(own.shape), past))
                send(own[:, :, :past], rank)
        kept = store[:, :, :, self._model.kv_heads(0)].contiguous()
        self._numbers[id(kept)] = self._newest
        return kept

    def free(self, stores: Sequence[Tensor]) -> None:
        """Forget stores that :meth:`keep` returned, on all ranks."""
        numbers = tuple(self._numbers.pop(id(store)) for store in stores)
        self._arranged = self._own = None
        with contextlib.suppress(StageUnavailable), self._together():
            for rank in range(1, self._model.ranks):
                self._send(rank, Free(numbers))

    def forward(self, embeddings: Tensor, batch: PackedBatch, kv: WorkspaceStep) -> Tensor:
        """Hidden states of the rows that are wanted, [tokens, hidden]; ``kv`` has stores that were kept.

        Raises:
            StageUnavailable: a rank has ended.
        """
        with self._together():
            if kv is not self._arranged:
                self._arrange(batch, kv)
            others = [(rank, part) for rank, part in enumerate(self._parts) if rank and part.layout.tokens]
            for rank, part in others:
                self._send(rank, Forward())
                send(part.of(embeddings), rank)
            first = self._parts[0]
            assert self._own is not None, "set with the parts"
            hidden = self._model.forward(first.of(embeddings), *self._own)
            if self._model.tensor_parallel:
                return hidden
            out = torch.empty_like(embeddings)
            out[first.wanted_rows] = hidden if self._own[0].wanted is None else hidden[self._own[0].wanted]
            for rank, part in others:
                rows = part.wanted_rows
                out[rows] = receive(embeddings.new_empty(len(rows), embeddings.shape[1]), rank)
            return out

    def close(self) -> None:
        """End the other ranks."""
        self._closing.set()
        for process in self._processes:
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):
                        pipe.close()
        for process in self._processes:
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if dist.is_initialized():
            dist.destroy_process_group()
        torch.set_num_threads(self._threads_before)

    def _arrange(self, batch: PackedBatch, kv: WorkspaceStep) -> None:
        """Send each rank its part of a new layout."""
        stores = [self._numbers[id(store)] for store in kv.stores]
        if self._model.tensor_parallel:
            self._parts = [whole(batch, kv, stores)] * self._model.ranks
        else:
            self._parts = by_sequence(batch, kv, stores, self._model.ranks)
        for rank, part in enumerate(self._parts):
            cos, sin = part.of(batch.cos), part.of(batch.sin)
            if rank:
                self._send(rank, Arrange(part.layout, returns=not self._model.tensor_parallel))
                send(cos, rank)
                send(sin, rank)
            else:
                by_number = dict(zip(stores, kv.stores, strict=True))
                self._own = part.layout.batch(cos, sin), part.layout.kv(by_number)
        self._arranged = kv

    @contextlib.contextmanager
    def _together(self) -> Iterator[None]:
        """Work of all ranks: where it fails midway they are out of step, and the group is of no use."""
        if self._ended.is_set():
            raise StageUnavailable("a rank of the DiT has ended; the stage starts again")
        try:
            yield
        except Exception as error:
            log.exception("dit: the ranks are out of step")
            self._end()
            raise StageUnavailable("a rank of the DiT has ended; the stage starts again") from error

    def _send(self, rank: int, message: Message) -> None:
        pipe: IO[bytes] | None = self._processes[rank - 1].stdin
        assert pipe is not None, "a pipe"
        messages.write(pipe, message)

    def _watch(self, rank: int, process: subprocess.Popen[bytes]) -> None:
        status = process.wait()
        if not self._closing.is_set():
            log.error("dit: rank %d, process %d, has ended with status %d", rank, process.pid, status)
            self._end()

    def _end(self) -> None:
        self._ended.set()
        self._lost()
