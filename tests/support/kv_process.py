"""Either end of a connector, or another thing, in a process of its own, told what to do through a pipe."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from bagel_triton.kv.block_pool import KVCacheFull, KVSequence
from bagel_triton.kv.connectors.base import Consumer, Producer, lend_pattern
from bagel_triton.kv.store import store_shape
from bagel_triton.protocol.errors import LeaseError
from bagel_triton.protocol.messages import Branch, CudaAddress, KVHandle, decode, encode
from tests.support.forkserver import FORKSERVER
from tests.support.kv import append, claim

WAIT_S = 60.0


class Peer:
    """The process; its exceptions come back as :class:`LeaseError` or :class:`KVCacheFull`."""

    def __init__(self, process: Any, pipe: Connection) -> None:
        self.process, self._pipe = process, pipe

    def ask(self, command: str, *arguments: Any) -> Any:
        """What the process answers to ``command``."""
        self._pipe.send((command, arguments))
        return self.answer()

    def tell(self, command: str, *arguments: Any) -> None:
        """As :meth:`ask`, without waiting."""
        self._pipe.send((command, arguments))

    def answer(self) -> Any:
        """The next answer; raises ``EOFError`` if the process has ended."""
        assert self._pipe.poll(WAIT_S), "the process says nothing"
        answer = self._pipe.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def lend(self, labels: range, ttl_s: float = 60.0, request_id: str = "r") -> KVHandle:
        """A producer's lease on a context of the tokens named ``labels``."""
        return decode(self.ask("lend", labels, ttl_s, request_id), KVHandle)

    def silent(self, seconds: float) -> bool:
        """Whether no answer comes for so long."""
        return not self._pipe.poll(seconds)

    def kill(self) -> None:
        """SIGKILL, and wait."""
        self.process.kill()
        self.process.join(WAIT_S)


@contextlib.contextmanager
def peer(make: Callable[..., Any], *arguments: Any) -> Iterator[Peer]:
    """A process that owns what ``make(*arguments)`` returns there.

    A producer or a consumer has the commands below; those of anything else are its methods.
    """
    ours, theirs = FORKSERVER.Pipe()
    process = FORKSERVER.Process(target=_run, args=(theirs, make, arguments), daemon=True)
    process.start()
    theirs.close()
    running = Peer(process, ours)
    try:
        assert running.answer() == "ready"
        yield running
    finally:
        with contextlib.suppress(BrokenPipeError):  # it was killed
            running.tell("end")
        process.join(WAIT_S)
        if process.is_alive():
            process.kill()
            process.join()
        ours.close()


def _run(pipe: Connection, make: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    end = make(*arguments)
    commands = _Lending(end) if isinstance(end, Producer) else _Reading(end) if isinstance(end, Consumer) else end
    pipe.send("ready")
    with contextlib.suppress(EOFError):  # the test has gone
        while True:
            command, given = pipe.recv()
            if command == "end":
                end.close()
                return
            try:
                answer = getattr(commands, command)(*given)
            except (LeaseError, KVCacheFull) as error:
                answer = error
            pipe.send(answer)


class _Lending:
    def __init__(self, producer: Producer) -> None:
        self._producer = producer
        self._parent: KVSequence | None = None

    def lend(self, labels: range, ttl_s: float, request_id: str) -> bytes:
        context = KVSequence(self._producer.pool)
        try:
            append(self._producer.pool, context, labels)
        except KVCacheFull:
            context.free()
            raise
        return self._publish(context, ttl_s, request_id)

    def fork(self, labels: range, more: range) -> bytes:
        """Two contexts with one past; the second, which grew by ``more``, is lent."""
        self._parent = KVSequence(self._producer.pool)
        append(self._producer.pool, self._parent, labels)
        child = self._parent.fork()
        append(self._producer.pool, child, more)
        return self._publish(child, 60.0, "fork")

    def lend_random(self, tokens: int, seed: int) -> bytes:
        """Much data: seeded numbers, as :func:`random_contents` makes them."""
        pool = self._producer.pool
        context = KVSequence(pool)
        slots = context.extend(tokens)
        pool.store[:, :, slots] = random_contents(pool.store, tokens, seed)
        return self._publish(context, 60.0, "random")

    def pattern(self) -> bytes:
        return encode(lend_pattern(self._producer, 60.0))

    def reclaim(self) -> int:
        return self._producer.leases.reclaim()

    def used(self) -> int:
        return self._producer.pool.blocks.used

    def close(self) -> None:
        self._producer.close()

    def _publish(self, context: KVSequence, ttl_s: float, request_id: str) -> bytes:
        if self._producer.pool.store.is_cuda:
            torch.cuda.synchronize(self._producer.pool.store.device)
        return encode(self._producer.leases.publish(request_id, Branch.GEN, context, ttl_s))


class _Reading:
    def __init__(self, consumer: Consumer) -> None:
        self._consumer = consumer

    def claim(self, handle: bytes) -> Tensor:
        lease = decode(handle, KVHandle)
        if not isinstance(lease.address, CudaAddress):
            return claim(self._consumer, lease)
        found = torch.full(store_shape(lease.geometry, lease.tokens), -1.0, device="cuda:0")
        self._consumer.claim(lease, found)
        return found.cpu()

    def release(self, handle: bytes) -> None:
        self._consumer.release(decode(handle, KVHandle))

    def check_random(self, handle: bytes, seed: int, device: str) -> tuple[bool, float]:
        """Whether the claim is what ``lend_random`` wrote, and the seconds it took."""
        lease = decode(handle, KVHandle)
        dtype = getattr(torch, lease.geometry.dtype)
        found = torch.zeros(store_shape(lease.geometry, lease.tokens), dtype=dtype, device=device)
        start = time.perf_counter()
        self._consumer.claim(lease, found)
        took = time.perf_counter() - start
        return torch.equal(found, random_contents(found, lease.tokens, seed)), took

    def stop_inside(self, handle: bytes) -> None:
        """Die in the middle of a claim: mapped, copied, and not given back."""
        lease = decode(handle, KVHandle)
        self._consumer.lease_table(lease).check(lease)
        os.kill(os.getpid(), 9)


def random_contents(like: Tensor, tokens: int, seed: int) -> Tensor:
    """Seeded whole numbers [layers, 2, tokens, kv_heads, head_dim] in the dtype and on the device of ``like``."""
    shape = (*like.shape[:2], tokens, *like.shape[3:])
    generator = torch.Generator(like.device).manual_seed(seed)
    return torch.randint(-128, 128, shape, generator=generator, device=like.device, dtype=torch.int16).to(like.dtype)
