"""``kv_handoff``: what it costs to hand a context from one process to another.

A trial is timed from just before the producer publishes until the consumer, in a process of
its own, has claimed; a message carries the handle between them. Beside every trial the
consumer copies as many bytes between two tensors of its own, which is the least that a claim
can cost. Destinations are memory that was written before, for both. The geometry is BAGEL's.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import secrets
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Literal, get_args

import msgspec
import torch

from bagel_triton.deploy.config import ConfigError, DeployConfig, MooncakeStoreConfig, ThinkerConfig
from bagel_triton.engine.build import open_consumer, open_producer
from bagel_triton.kv.block_pool import KVSequence
from bagel_triton.kv.connectors.base import ConnectorUnavailable, Producer
from bagel_triton.kv.store import store_shape, token_bytes
from bagel_triton.protocol.messages import Branch, KVGeometry, KVHandle, decode, encode

GEOMETRY = KVGeometry(layers=28, kv_heads=4, head_dim=128, block_tokens=16, dtype="bfloat16")
MEGABYTE = 1 << 20
SIZES = (1, 16, 64, 256)
TRIALS = 11
TTL_S = 600.0
SETTLE_S = 0.02
GOAL_RATIO, GOAL_MS = 1.2, 1.0
Connector = Literal["local", "shm", "cuda_ipc", "mooncake", "mooncake_store"]
BlockAllocator = Literal["consecutive", "scattered"]


@dataclass(frozen=True)
class Handoff:
    """One row: milliseconds, medians of the trials; ``first_ms`` is the one before, which maps or connects too."""

    connector: Connector
    blocks: BlockAllocator
    megabytes: int
    handoff_ms: float
    copy_ms: float
    first_ms: float

    @property
    def missed(self) -> bool:
        """Whether ``shm`` took longer than its goal allows; the others have none."""
        return self.connector == "shm" and self.handoff_ms > GOAL_RATIO * self.copy_ms + GOAL_MS


@dataclass(frozen=True)
class Unavailable:
    """A connector that could not be measured, and why."""

    connector: Connector
    reason: str


def run(
    connectors: Sequence[Connector] | None = None,
    megabytes: Sequence[int] = SIZES,
    trials: int = TRIALS,
    master: str = "",
) -> Iterator[Handoff | Unavailable]:
    """A row for each connector, size and kind of blocks, as soon as it is measured.

    Args:
        connectors: None for those worth trying here.
        master: of ``mooncake_store``, HOST:PORT.
    """
    for connector in available(master) if connectors is None else connectors:
        try:
            for size in megabytes:
                for blocks in get_args(BlockAllocator):
                    yield measure(connector, size, blocks, trials, master)
        except (ConnectorUnavailable, ConfigError) as error:
            yield Unavailable(connector, str(error))


def measure(
    connector: Connector, megabytes: int, blocks: BlockAllocator, trials: int = TRIALS, master: str = ""
) -> Handoff:
    """Hand a context of ``megabytes`` over, ``trials`` times.

    Raises:
        ConnectorUnavailable: the connector cannot be used here.
    """
    tokens = -(-megabytes * MEGABYTE // token_bytes(GEOMETRY))
    config = _config(connector, tokens, master)
    device = torch.device("cuda:0" if connector == "cuda_ipc" else "cpu")
    producer = open_producer(config, GEOMETRY, device)
    try:
        with _consumer(config, device, tokens) as pipe:
            handoffs, copies = [], []
            for _ in range(1 + trials):
                handoff, copy = _trial(producer, pipe, tokens, blocks)
                handoffs.append(handoff * 1e3)
                copies.append(copy * 1e3)
    finally:
        producer.close()
    return Handoff(
        connector, blocks, megabytes, statistics.median(handoffs[1:]), statistics.median(copies[1:]), handoffs[0]
    )


def _config(connector: Connector, tokens: int, master: str) -> DeployConfig:
    return DeployConfig(
        checkpoint="",
        pipeline="bagel_single_stage" if connector == "local" else "bagel",
        connector="auto" if connector == "local" else connector,
        mooncake_store=MooncakeStoreConfig(master=master),
        shm_prefix=f"bagel_triton_bench_{os.getpid()}_{secrets.token_hex(4)}",
        thinker=ThinkerConfig(kv_tokens=2 * tokens + 2 * GEOMETRY.block_tokens, block_tokens=GEOMETRY.block_tokens),
    )


def _trial(producer: Producer, pipe: Connection, tokens: int, blocks: BlockAllocator) -> tuple[float, float]:
    """Seconds from publish to claimed, and of a plain copy."""
    pool = producer.pool
    context, gaps = KVSequence(pool), KVSequence(pool)
    if blocks == "scattered":  # no two blocks stand together
        for start in range(0, tokens, GEOMETRY.block_tokens):
            context.extend(min(GEOMETRY.block_tokens, tokens - start))
            gaps.extend(GEOMETRY.block_tokens)
        gaps.free()
    else:
        context.extend(tokens)
    pool.store[:, :, pool.read_slots(context)] = 1.0
    if pool.store.is_cuda:
        torch.cuda.synchronize(pool.store.device)
    time.sleep(SETTLE_S)  # threads that have just computed spin a while, and would keep a core from the consumer
    started = time.monotonic()
    handle = producer.leases.publish("bench", Branch.GEN, context, TTL_S)
    pipe.send_bytes(encode(handle))
    claimed, copy = pipe.recv()
    producer.leases.reclaim()
    return claimed - started, copy


@contextmanager
def _consumer(config: DeployConfig, device: torch.device, tokens: int) -> Iterator[Connection]:
    """The consumer's pipe; ``local`` has it in this process, the others in one of its own."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    other: threading.Thread | multiprocessing.context.SpawnProcess
    if config.topology.one_process:
        other = threading.Thread(target=_consume, args=(theirs, config, device, tokens))
    else:
        other = context.Process(target=_consume, args=(theirs, config, device, tokens))
    other.start()
    try:
        ours.recv()  # it is ready
        yield ours
    finally:
        ours.send_bytes(b"")
        other.join()
        ours.close()
        theirs.close()


def _consume(pipe: Connection, config: DeployConfig, device: torch.device, tokens: int) -> None:
    """Claim what comes, until an empty message; answer with when that was done, and how long a copy takes."""
    consumer = open_consumer(config, device)
    shape, dtype = store_shape(GEOMETRY, tokens), getattr(torch, GEOMETRY.dtype)
    workspace, source, target = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(3))
    for tensor in (workspace, source, target):
        tensor.fill_(2.0)  # zeros may be memory that was never touched
    pipe.send(None)
    while message := pipe.recv_bytes():
        consumer.claim(decode(message, KVHandle), workspace)
        claimed = time.monotonic()
        target.copy_(source)
        if target.is_cuda:
            torch.cuda.synchronize(device)
        copied = time.monotonic()
        if not bool((workspace == 1.0).all()):
            raise AssertionError("what was claimed is not what was lent")
        workspace.fill_(2.0)
        pipe.send((claimed, copied - claimed))  # last, so that the next trial finds this process waiting
    consumer.close()


def available(master: str = "") -> tuple[Connector, ...]:
    """The connectors worth trying on this machine: CUDA's where there is a GPU, the store's where a master is named."""
    useless = {"cuda_ipc": not torch.cuda.is_available(), "mooncake_store": not master}
    return tuple(name for name in get_args(Connector) if not useless.get(name))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; the exit status is 1 where ``shm`` misses its goal."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--connectors", nargs="+", choices=get_args(Connector), help="default: those here")
    parser.add_argument("--megabytes", nargs="+", type=int, default=SIZES)
    parser.add_argument("--trials", type=int, default=TRIALS)
    parser.add_argument("--mooncake-master", default="", metavar="HOST:PORT", help="for mooncake_store")
    parser.add_argument("--json", action="store_true", help="one line of JSON a row")
    args = parser.parse_args(arguments)
    missed = False
    if not args.json:
        print(HEADER)
    for row in run(args.connectors, args.megabytes, args.trials, args.mooncake_master):
        missed |= isinstance(row, Handoff) and row.missed
        print(msgspec.json.encode(row).decode() if args.json else line(row), flush=True)
    return int(missed)


HEADER = f"{'connector':<15}{'blocks':<13}{'MB':>5}{'handoff ms':>12}{'copy ms':>10}{'ratio':>7}{'first ms':>10}"


def line(row: Handoff | Unavailable) -> str:
    """A row for a person, under ``HEADER``."""
    if isinstance(row, Unavailable):
        return f"{row.connector}: not measured: {row.reason}"
    times = f"{row.handoff_ms:>12.2f}{row.copy_ms:>10.2f}{row.handoff_ms / row.copy_ms:>7.2f}{row.first_ms:>10.2f}"
    return f"{row.connector:<15}{row.blocks:<13}{row.megabytes:>5}{times}{'  over the goal' if row.missed else ''}"


if __name__ == "__main__":
    raise SystemExit(main())
