"""``mooncake``: the pool is memory of the thinker's process that the DiT reads over a network.

The producer registers its store and the lease words with Mooncake's transfer engine, by TCP
or RDMA. A pool on a GPU has a copy in the host's memory, of the same layout, which is registered in
its place: a context is copied there before its lease is granted, and a consumer on a GPU copies
from a buffer in its own host's memory. So the library needs no CUDA. No GPU has run this.

A handle carries the engine's name and both addresses. The consumer follows the
protocol of :mod:`bagel_triton.kv.lease` by transfers: it reads the header and a slot's words
before and after its copy, and writes the consumer's words.

The hosts' clocks are never compared: a lease's time is the producer's own, and its ``granted``
word tells when it has ended. A consumer that needs longer raises ``renewals``; one that cannot
reach the producer any more loses its lease when that expires.

Mooncake has no authentication. Its library listens on two ports of **every** interface,
regardless of ``host``, and gives registered memory to any peer that connects. Those ports
belong on a network of trusted hosts; ``MC_MIN_PRC_PORT`` and ``MC_MAX_PRC_PORT`` in the
environment bound them. Peers need no master and no metadata server.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bagel_triton.deploy.config import MooncakeConfig
from bagel_triton.kv.block_pool import KVCachePool, KVSequence
from bagel_triton.kv.connectors.base import ConnectorUnavailable, Consumer, Producer, check_blocks
from bagel_triton.kv.lease import LeaseManager, LeaseTable, consumer_words, row_bytes, table_words
from bagel_triton.kv.store import new_store, runs_of
from bagel_triton.protocol.errors import LeaseError
from bagel_triton.protocol.messages import KVGeometry, KVHandle, MooncakeAddress

log = logging.getLogger(__name__)
PACKAGE = "mooncake-transfer-engine-non-cuda"
MISSING = f"connector=mooncake needs the Python package {PACKAGE}: install the extra bagel-triton[mooncake]"
CPU = torch.device("cpu")
RDMA_DEVICES = Path("/sys/class/infiniband")
# Debian's names of the packages with the libraries that the wheel expects of the system.
SYSTEM_PACKAGES = {"libibverbs.so.1": "libibverbs1", "libnuma.so.1": "libnuma1", "libcurl.so.4": "libcurl4"}
SLOW_S = 0.2
PIECES = 128  # of one batch: with a few thousand the library's queue overflows and all of them fail
Piece = tuple[int, int, int]  # local address, peer's address, bytes


class TransferEngine:
    """One engine; ``peer`` is the name by which others reach it.

    Raises:
        ConnectorUnavailable: the library or the RDMA device is missing, or it would not start.
    """

    def __init__(self, config: MooncakeConfig) -> None:
        library = load("mooncake.engine")
        prepare(config)
        self._config = config
        self._engine = library.TransferEngine()
        if self._engine.initialize(config.host, "P2PHANDSHAKE", config.protocol, config.device_name):
            raise ConnectorUnavailable(f"Mooncake's transfer engine did not start with {config}")
        self.peer = f"{config.host}:{self._engine.get_rpc_port()}"
        self._failed_at: dict[str, float] = {}

    @property
    def reads_unregistered_memory(self) -> bool:
        """Whether the local side of a transfer may be memory that was never registered."""
        return self._config.protocol == "tcp"

    def register(self, address: int, size: int) -> None:
        """Let peers read and write ``size`` bytes at ``address``, and the network card too."""
        if self._engine.register_memory(address, size):
            raise ConnectorUnavailable(f"Mooncake's transfer engine could not register {size} bytes of memory")

    def unregister(self, address: int) -> None:
        """Take memory back before it is freed."""
        if self._engine.unregister_memory(address):
            raise RuntimeError(f"memory at {address:#x} was not registered")

    def read(self, peer: str, pieces: Sequence[Piece]) -> None:
        """Copy from ``peer``; raises :class:`LeaseError` if it does not answer or has no such memory."""
        self._transfer(self._engine.batch_transfer_sync_read, peer, pieces)

    def write(self, peer: str, pieces: Sequence[Piece]) -> None:
        """Copy to ``peer``; errors as for :meth:`read`."""
        self._transfer(self._engine.batch_transfer_sync_write, peer, pieces)

    def _transfer(self, transfer: Any, peer: str, pieces: Sequence[Piece]) -> None:
        failed_at = self._failed_at.get(peer)
        if failed_at is not None and time.monotonic() - failed_at < self._config.timeout_s:
            # An attempt at a dead peer takes seconds, and many leases may point there.
            raise LeaseError(f"the pool at {peer} did not answer a moment ago")
        started = time.monotonic()
        for start in range(0, len(pieces), PIECES):
            local, remote, sizes = (list(column) for column in zip(*pieces[start : start + PIECES], strict=True))
            if transfer(peer, local, remote, sizes):
                if time.monotonic() - started > SLOW_S:
                    self._failed_at[peer] = time.monotonic()
                raise LeaseError(f"the pool at {peer} cannot be read: its stage has ended or is out of reach")
        self._failed_at.pop(peer, None)


def load(module: str) -> Any:
    """A module of the library; raises :class:`ConnectorUnavailable` naming what to install."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ConnectorUnavailable(MISSING) from error
    except ImportError as error:
        found = re.match(r"(lib\S+\.so\S*): cannot open shared object file", str(error))
        if found is None:
            raise
        library = found[1]
        raise ConnectorUnavailable(
            f"connector=mooncake needs the system library {library}: install the package "
            f"{SYSTEM_PACKAGES.get(library, f'that brings {library}')} (its name on Debian and Ubuntu)"
        ) from error


def check_here(config: MooncakeConfig) -> None:
    """Refuse what could not start on this machine, without loading the library.

    Raises:
        ConnectorUnavailable: the package or the RDMA device is missing.
    """
    if importlib.util.find_spec("mooncake") is None:
        raise ConnectorUnavailable(MISSING)
    check_device(config)


def prepare(config: MooncakeConfig) -> None:
    """Set options that the library only reads from the environment, when an engine starts.

    Raises:
        ConnectorUnavailable: the RDMA device is missing.
    """
    check_device(config)
    if config.protocol == "tcp":  # it may choose RDMA otherwise
        os.environ["MC_FORCE_TCP"] = "1"
    # Limits for a transfer to a silent peer.
    for variable in ("MC_TCP_PROGRESS_TIMEOUT_SEC", "MC_TCP_STATUS_TIMEOUT_SEC"):
        os.environ[variable] = str(config.timeout_s)


def check_device(config: MooncakeConfig) -> None:
    """Refuse a missing RDMA device; the library would fall back to TCP silently, or abort."""
    if config.protocol != "rdma":
        return
    devices = sorted(path.name for path in RDMA_DEVICES.iterdir()) if RDMA_DEVICES.is_dir() else []
    if not devices:
        raise ConnectorUnavailable(f"mooncake.protocol='rdma' needs an RDMA device; {RDMA_DEVICES} has none")
    if missing := [name for name in config.device_name.split(",") if name and name not in devices]:
        raise ConnectorUnavailable(f"mooncake.device_name={missing}: the RDMA devices here are {', '.join(devices)}")


class MooncakeProducer(Producer):
    """A pool of ``blocks`` blocks on ``device``; in this process's memory it, or its copy, is registered."""

    def __init__(
        self, geometry: KVGeometry, blocks: int, prefix: str, engine: TransferEngine, device: torch.device = CPU
    ) -> None:
        generation = time.time_ns()
        slots = blocks * geometry.block_tokens
        store = self._lent = new_store(geometry, slots, device)
        if store.is_cuda:
            self._lent = torch.empty(store.shape, dtype=store.dtype, pin_memory=True)
        self._words = np.zeros(table_words(), dtype=np.int64)
        self._engine: TransferEngine | None = engine
        engine.register(self._lent.data_ptr(), self._lent.nbytes)
        engine.register(self._words.ctypes.data, self._words.nbytes)
        self.pool = KVCachePool(store, geometry)
        address = MooncakeAddress(engine.peer, self._lent.data_ptr(), self._words.ctypes.data, slots)
        name, table = f"{prefix}_kv_{generation}", LeaseTable(self._words)
        copy = functools.partial(_copy_to_host, store, self._lent, geometry.block_tokens) if store.is_cuda else None
        self.leases = LeaseManager(self.pool, table, name, "mooncake", generation, address=address, before_grant=copy)

    def close(self) -> None:
        """End all leases and unregister the memory."""
        self.leases.close()
        if self._engine is not None:
            self._engine.unregister(self._lent.data_ptr())
            self._engine.unregister(self._words.ctypes.data)
            self._engine = None


def _copy_to_host(store: Tensor, lent: Tensor, block_tokens: int, context: KVSequence) -> None:
    """Bring a context on the GPU to the same slots of the host's memory."""
    for run in runs_of(context.blocks, context.tokens, block_tokens):
        # A layer's keys, or its values, are one run of bytes each, so no copy goes by way of another buffer.
        planes = (tensor[:, :, run].flatten(0, 1).unbind() for tensor in (lent, store))
        for target, source in zip(*planes, strict=True):
            target.copy_(source, non_blocking=True)
    torch.cuda.current_stream(store.device).synchronize()


class _RemoteTable(LeaseTable):
    """This host's copy of the words at ``base`` in ``peer``'s process, refreshed row by row."""

    def __init__(self, engine: TransferEngine, peer: str, base: int) -> None:
        self._copy = np.zeros(table_words(), dtype=np.int64)
        super().__init__(self._copy)
        self._engine, self._peer, self._base = engine, peer, base
        engine.register(self._copy.ctypes.data, self._copy.nbytes)

    def fetch(self, slot: int) -> None:
        self._engine.read(self._peer, [self._piece(0, row_bytes()), self._piece((1 + slot) * row_bytes(), row_bytes())])

    def send(self, slot: int) -> None:
        first, last = consumer_words()
        try:
            self._engine.write(self._peer, [self._piece((1 + slot) * row_bytes() + first, last - first)])
        except LeaseError as error:  # the copy is good, and the lease expires
            log.warning("a lease could not be released or renewed: %s", error)

    def close(self) -> None:
        """Unregister the copy."""
        self._engine.unregister(self._copy.ctypes.data)

    def _piece(self, offset: int, size: int) -> Piece:
        return (self._copy.ctypes.data + offset, self._base + offset, size)


class MooncakeConsumer(Consumer):
    """Reads pools on any host that ``engine`` reaches.

    Memory of the CPU is written in place if the transport allows that. RDMA and a GPU go
    through a registered buffer, as large as the largest context so far.
    """

    def __init__(self, engine: TransferEngine) -> None:
        self._engine = engine
        self._table: tuple[MooncakeAddress, _RemoteTable] | None = None
        self._buffer: Tensor | None = None

    def lease_table(self, handle: KVHandle) -> LeaseTable:
        """The words of the handle's pool; fetched when they are read."""
        address = _address(handle)
        if self._table is None or self._table[0] != address:
            self._close_table()
            self._table = (address, _RemoteTable(self._engine, address.peer, address.words))
        return self._table[1]

    def read(self, handle: KVHandle, destination: Tensor) -> None:
        """Transfer the context's runs of blocks, layer by layer, keys and values."""
        address = _address(handle)
        check_blocks(handle, address.slots)
        in_place = (
            self._engine.reads_unregistered_memory and not destination.is_cuda and destination[0, 0].is_contiguous()
        )
        target = destination if in_place else self._buffer_like(destination)
        self._engine.read(address.peer, _pieces(handle, address, target))
        if target is not destination:
            destination.copy_(target)
            if destination.is_cuda:
                torch.cuda.current_stream(destination.device).synchronize()

    def _buffer_like(self, destination: Tensor) -> Tensor:
        """Registered memory in the form of ``destination``."""
        if self._buffer is None or self._buffer.numel() < destination.nbytes:
            self._close_buffer()
            self._buffer = torch.empty(destination.nbytes, dtype=torch.uint8, pin_memory=destination.is_cuda)
            self._engine.register(self._buffer.data_ptr(), self._buffer.nbytes)
        return self._buffer[: destination.nbytes].view(destination.dtype).view(destination.shape)

    def _close_table(self) -> None:
        if self._table is not None:
            self._table[1].close()
            self._table = None

    def _close_buffer(self) -> None:
        if self._buffer is not None:
            self._engine.unregister(self._buffer.data_ptr())
            self._buffer = None

    def close(self) -> None:
        """Unregister the words and the buffer."""
        self._close_table()
        self._close_buffer()


def _address(handle: KVHandle) -> MooncakeAddress:
    if not isinstance(handle.address, MooncakeAddress):
        raise LeaseError(
            f"the lease of request {handle.request_id} is of connector {handle.connector}; this stage has mooncake"
        )
    return handle.address


def _pieces(handle: KVHandle, address: MooncakeAddress, target: Tensor) -> list[Piece]:
    """Source, destination and size of each run of consecutive tokens."""
    geometry, itemsize = handle.geometry, target.element_size()
    token = geometry.kv_heads * geometry.head_dim * itemsize
    runs = runs_of(handle.blocks, handle.tokens, geometry.block_tokens)
    pieces = []
    for plane in range(2 * geometry.layers):
        layer, side = divmod(plane, 2)
        local = target[layer, side].data_ptr()
        remote = address.store + plane * address.slots * token
        for run in runs:
            size = (run.stop - run.start) * token
            pieces.append((local, remote + run.start * token, size))
            local += size
    return pieces
