"""``mooncake_store``: contexts are objects in Mooncake's store, put by the thinker, got by the DiT.

With ``mooncake`` the DiT reads the thinker's pool. Here each lease is an object of its own, so
its blocks are free as soon as it is published; the price is a second copy in the store's memory,
and the thinker's time to write it. A GPU's contexts are copied to the host's memory first, and
from there to the DiT's GPU, which has not run. Keys take the place of the lease table's words:

======== ===========================================================================
granted  the key ``POOL/LEASE`` exists; a pool's name holds its generation
released the consumer deletes that key
renewals the consumer changes the value of ``POOL/LEASE/renewals``
======== ===========================================================================

Keys never repeat. An object that is deleted during a read may be overwritten, so a claim
checks its key again after the copy, as on shared memory. A producer that dies takes its segment
of the store and the objects in it along. Clocks are not compared.

One ``mooncake_master`` knows where objects are. Like the transfer engine, whose ports the store
shares, it has no authentication: it belongs on a network of trusted hosts.
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bagel_triton.deploy.config import MooncakeStoreConfig
from bagel_triton.kv.block_pool import KVCacheFull, KVCachePool, KVSequence
from bagel_triton.kv.connectors.base import ConnectorUnavailable, Consumer, LeaseView, Producer
from bagel_triton.kv.connectors.mooncake import CPU, load, prepare
from bagel_triton.kv.store import gather, new_store, store_shape
from bagel_triton.protocol.errors import LeaseError
from bagel_triton.protocol.messages import Branch, KVGeometry, KVHandle

log = logging.getLogger(__name__)
UNIT = 16 << 20  # the smallest segment the library accepts
# Codes of the library, which has no names for them in Python.
NO_ROOM, NOT_LISTENING = -200, -900


class StoreFull(Exception):
    """No process of the store has room for the object."""


class ObjectStore:
    """This process's connection to the store, to which it lends ``segment`` bytes.

    Raises:
        ConnectorUnavailable: the library or the RDMA device is missing, no master answers, or
            there is no memory for the segment.
    """

    def __init__(self, config: MooncakeStoreConfig, segment: int = 0) -> None:
        library = load("mooncake.store")
        prepare(config)
        check_master(config)
        self._config = config
        self._pinned = library.ReplicateConfig()
        self._pinned.with_hard_pin = True  # a lease's contents must not be evicted
        self._store = library.MooncakeDistributedStore()
        if code := self._store.setup(
            config.host,
            config.metadata_server,
            -(-segment // UNIT) * UNIT,
            config.localbuf,
            config.protocol,
            config.device_name,
            config.master,
        ):
            raise ConnectorUnavailable(f"Mooncake's store did not start (code {code}) with {config}")
        # Prefer this process's segment: the master offers a killed process's for seconds after.
        self._pinned.preferred_segment = self._store.get_hostname()
        self._failed_at: float | None = None

    def register(self, address: int, size: int) -> None:
        """Let :meth:`put` and :meth:`get` use ``size`` bytes at ``address``."""
        if self._store.register_buffer(address, size):
            raise ConnectorUnavailable(f"Mooncake's store could not register {size} bytes of memory")

    def unregister(self, address: int) -> None:
        """Take memory back before it is freed."""
        self._store.unregister_buffer(address)

    def put(self, key: str, address: int, size: int) -> None:
        """Store ``size`` bytes under a new key; raises :class:`StoreFull`."""
        code = self._ask(self._store.put_from, key, address, size, self._pinned)
        if code == NO_ROOM:
            raise StoreFull(f"Mooncake's store has no room for {size} bytes")
        if code:
            raise LeaseError(f"Mooncake's store did not take {size} bytes (code {code})")

    def get(self, key: str, address: int, size: int) -> int:
        """Copy an object to ``address``; its size, or a negative number if that fails."""
        return int(self._ask(self._store.get_into, key, address, size))

    def exist(self, keys: Sequence[str]) -> list[bool]:
        """Whether each of the keys exists."""
        found: list[int] = self._ask(self._store.batch_is_exist, list(keys))
        return [code == 1 for code in found]

    def remove(self, keys: Sequence[str]) -> None:
        """Delete keys, existing or not. A read in progress returns garbage."""
        self._ask(self._store.batch_remove, list(keys), True)

    def set_value(self, key: str, text: bytes) -> None:
        """Set a few bytes under ``key``, old or new."""
        self._ask(self._store.upsert, key, text)

    def value_of(self, key: str) -> bytes:
        """The bytes under ``key``; empty if there are none."""
        return bytes(self._ask(self._store.get, key))

    def close(self) -> None:
        """Leave the store; objects in this process's segment are gone."""
        self._store.close()

    def _ask(self, call: Any, *arguments: Any) -> Any:
        now = time.monotonic()
        if self._failed_at is not None and now - self._failed_at < self._config.timeout_s:
            # An attempt at a dead master takes seconds, and many leases need it.
            raise LeaseError(f"Mooncake's master at {self._config.master} did not answer a moment ago")
        answer = call(*arguments)
        codes = answer if isinstance(answer, list) else [answer]
        self._failed_at = now if NOT_LISTENING in codes else None
        if self._failed_at is not None:
            raise LeaseError(f"Mooncake's master at {self._config.master} does not answer")
        return answer


def check_master(config: MooncakeStoreConfig) -> None:
    """Refuse a master that does not answer; the library would retry for minutes."""
    host, _, port = config.master.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=config.timeout_s).close()
    except OSError as error:
        raise ConnectorUnavailable(
            f"connector=mooncake_store: no mooncake_master answers at {config.master} ({error}); start it first"
        ) from error


def _key(handle: KVHandle) -> str:
    return f"{handle.pool}/{handle.lease}"


def _renewals(key: str) -> str:
    return f"{key}/renewals"


class _Buffer:
    """Memory that the store may read and write, as large as the largest context so far."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._bytes: Tensor | None = None

    def like(self, geometry: KVGeometry, tokens: int) -> Tensor:
        """An uninitialised context, [layers, 2, tokens, kv_heads, head_dim]."""
        dtype = getattr(torch, geometry.dtype)
        shape = store_shape(geometry, tokens)
        size = torch.Size(shape).numel() * dtype.itemsize
        if self._bytes is None or self._bytes.numel() < size:
            self.close()
            self._bytes = torch.empty(size, dtype=torch.uint8)
            self._store.register(self._bytes.data_ptr(), size)
        return self._bytes[:size].view(dtype).view(shape)

    def close(self) -> None:
        """Unregister the memory."""
        if self._bytes is not None:
            self._store.unregister(self._bytes.data_ptr())
            self._bytes = None


@dataclass
class _Stored:
    request_id: str
    key: str
    blocks: int
    ttl_s: float
    expires_at: float
    renewals: bytes = b""


class StoreLeases:
    """The producer's side, with the calls of :class:`~bagel_triton.kv.lease.LeaseManager`."""

    def __init__(
        self,
        pool: KVCachePool,
        store: ObjectStore,
        name: str,
        generation: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._pool, self._store, self._name, self._generation, self._clock = pool, store, name, generation, clock
        self._buffer = _Buffer(store)
        self._leases: list[_Stored] = []
        self._last_lease = 0

    def __len__(self) -> int:
        return len(self._leases)

    @property
    def blocks(self) -> int:
        """Blocks' worth of contexts in the store: the thinker admits no more than the pool's size."""
        return sum(lease.blocks for lease in self._leases)

    def publish(self, request_id: str, branch: Branch, context: KVSequence, ttl_s: float) -> KVHandle:
        """Lend a copy of ``context`` for ``ttl_s`` seconds; its own blocks are free on return.

        Raises:
            KVCacheFull: the store has no room; the caller still owns the context.
            LeaseError: the store's master does not answer; likewise.
        """
        lease, tokens, next_position, blocks = 0, context.tokens, context.next_position, tuple(context.blocks)
        expires_at = self._clock() + ttl_s
        if tokens:
            self._last_lease = lease = self._last_lease + 1
            key = f"{self._name}/{lease}"
            copy = self._buffer.like(self._pool.geometry, tokens)
            gather(self._pool.store, self._pool.read_slots(context), copy)
            try:
                self._store.put(key, copy.data_ptr(), copy.nbytes)
            except StoreFull as error:
                raise KVCacheFull(str(error)) from error
            self._leases.append(_Stored(request_id, key, len(blocks), ttl_s, expires_at))
            context.free()
        return KVHandle(
            request_id=request_id,
            branch=branch,
            connector="mooncake_store",
            pool=self._name,
            generation=self._generation,
            slot=0,
            lease=lease,
            blocks=blocks,  # a handle must have them; the consumer does not read them
            tokens=tokens,
            next_position=next_position,
            geometry=self._pool.geometry,
            expires_at=expires_at,
        )

    def reclaim(self) -> int:
        """End every lease that was released or has expired; how many there were."""
        if not self._leases:
            return 0
        now = self._clock()
        try:
            there = self._store.exist([lease.key for lease in self._leases])
            for lease in self._leases:
                if (
                    lease.expires_at <= now
                    and (renewals := self._store.value_of(_renewals(lease.key))) != lease.renewals
                ):
                    lease.renewals, lease.expires_at = renewals, now + lease.ttl_s
        except LeaseError as error:
            log.warning("leases cannot be looked up and will expire: %s", error)
            there = [True] * len(self._leases)
        found = zip(self._leases, there, strict=True)
        return self._end([lease for lease, exists in found if not exists or lease.expires_at <= now])

    def revoke(self, request_id: str) -> int:
        """End every lease of a request that was aborted or failed; how many there were."""
        return self._end([lease for lease in self._leases if lease.request_id == request_id])

    def close(self) -> None:
        """End every lease."""
        self._end(list(self._leases))
        self._buffer.close()

    def _end(self, ended: list[_Stored]) -> int:
        if ended:
            self._leases = [lease for lease in self._leases if lease not in ended]
            keys = [lease.key for lease in ended]
            try:
                self._store.remove(keys + [_renewals(key) for key in keys])
            except LeaseError as error:
                log.warning("leases could not be deleted from the store: %s", error)
        return len(ended)


class MooncakeStoreProducer(Producer):
    """A pool of ``blocks`` blocks on ``device``, whose contexts are copied to the store."""

    def __init__(
        self, geometry: KVGeometry, blocks: int, prefix: str, store: ObjectStore, device: torch.device = CPU
    ) -> None:
        generation = time.time_ns()
        slots = blocks * geometry.block_tokens
        tokens = new_store(geometry, slots, device)
        self.pool = KVCachePool(tokens, geometry)
        self.leases = StoreLeases(self.pool, store, f"{prefix}_kv_{generation}", generation)
        self._store: ObjectStore | None = store

    def close(self) -> None:
        """End all leases and leave the store."""
        if self._store is not None:
            self.leases.close()
            self._store.close()
            self._store = None


class _StoredLease:
    """One handle's lease words, kept as keys."""

    def __init__(self, store: ObjectStore, handle: KVHandle) -> None:
        self._store, self._key = store, _key(handle)

    def carries(self, handle: KVHandle) -> bool:
        return self._store.exist([self._key])[0]

    def check(self, handle: KVHandle) -> None:
        if not self.carries(handle):
            raise LeaseError(
                f"lease {handle.lease} of request {handle.request_id}, branch {handle.branch} has ended or was "
                "released before"
            )

    def release(self, slot: int, lease: int) -> None:
        try:
            self._store.remove([self._key, _renewals(self._key)])
        except LeaseError as error:  # the copy is good, and the lease expires
            log.warning("a lease could not be released: %s", error)

    def renew(self, slot: int) -> None:
        self._store.set_value(_renewals(self._key), str(time.monotonic_ns()).encode())  # any new value renews


class MooncakeStoreConsumer(Consumer):
    """Gets contexts from the store, by way of a buffer."""

    def __init__(self, store: ObjectStore) -> None:
        self._store, self._buffer = store, _Buffer(store)

    def lease_table(self, handle: KVHandle) -> LeaseView:
        """The keys of the handle's lease."""
        if handle.connector != "mooncake_store":
            raise LeaseError(
                f"the lease of request {handle.request_id} is of connector {handle.connector}; "
                "this stage has mooncake_store"
            )
        return _StoredLease(self._store, handle)

    def read(self, handle: KVHandle, destination: Tensor) -> None:
        """Get the whole context into the buffer, then copy it."""
        copy = self._buffer.like(handle.geometry, handle.tokens)
        size = self._store.get(_key(handle), copy.data_ptr(), copy.nbytes)
        if size != copy.nbytes:
            reason = "its stage has ended or is out of reach" if size < 0 else f"it has {size} bytes, not {copy.nbytes}"
            raise LeaseError(f"the context of request {handle.request_id} cannot be read: {reason}")
        destination.copy_(copy)
        if destination.is_cuda:
            torch.cuda.current_stream(destination.device).synchronize()

    def close(self) -> None:
        """Leave the store."""
        self._buffer.close()
        self._store.close()
