"""Mooncake's store: objects by key, in memory that processes lend it; one ``mooncake_master`` knows where.

As with the transfer engine, whose ports these are too, nobody is asked for a password: the
master and every process that joins belong on a network of trusted hosts.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from typing import Any

from bagel_triton.deploy.config import MooncakeStoreConfig
from bagel_triton.kv.connectors.base import ConnectorUnavailable
from bagel_triton.kv.connectors.transfer_engine import load, prepare
from bagel_triton.protocol.errors import LeaseError

UNIT = 16 << 20  # the library takes no smaller segment
# The library's codes, of which it has no names in Python.
NO_ROOM, NOT_LISTENING = -200, -900


class StoreFull(Exception):
    """No process that joined has room for the object."""


class ObjectStore:
    """This process's part of the store, to which it lends ``segment`` bytes.

    Raises:
        ConnectorUnavailable: the library or the RDMA device is missing, no master answers, or
            there is no memory for the segment.
    """

    def __init__(self, config: MooncakeStoreConfig, segment: int = 0) -> None:
        library = load("mooncake.store")
        prepare(config)
        _greet(config)
        self._config = config
        self._pinned = library.ReplicateConfig()
        self._pinned.with_hard_pin = True  # a lease's contents may not make room for others
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
        # Its own segment first: the master offers one whose process was killed for seconds after.
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
        """Keep ``size`` bytes under a new key; raises :class:`StoreFull`."""
        code = self._ask(self._store.put_from, key, address, size, self._pinned)
        if code == NO_ROOM:
            raise StoreFull(f"Mooncake's store has no room for {size} bytes")
        if code:
            raise LeaseError(f"Mooncake's store did not take {size} bytes (code {code})")

    def get(self, key: str, address: int, size: int) -> int:
        """Copy an object to ``address``; its size, or a negative number where it cannot be had."""
        return int(self._ask(self._store.get_into, key, address, size))

    def exist(self, keys: Sequence[str]) -> list[bool]:
        """Which of the keys are there."""
        found: list[int] = self._ask(self._store.batch_is_exist, list(keys))
        return [code == 1 for code in found]

    def remove(self, keys: Sequence[str]) -> None:
        """Delete; a key that is not there is none to delete. Whoever reads one now reads rubbish."""
        self._ask(self._store.batch_remove, list(keys), True)

    def note(self, key: str, text: bytes) -> None:
        """Keep a few bytes under ``key``, over what was there."""
        self._ask(self._store.upsert, key, text)

    def noted(self, key: str) -> bytes:
        """What was noted under ``key``; empty where nothing was."""
        return bytes(self._ask(self._store.get, key))

    def close(self) -> None:
        """Leave; objects in this process's segment are gone."""
        self._store.close()

    def _ask(self, call: Any, *arguments: Any) -> Any:
        now = time.monotonic()
        if self._failed_at is not None and now - self._failed_at < self._config.timeout_s:
            # Each attempt at a master that has gone takes seconds, and many leases need it.
            raise LeaseError(f"Mooncake's master at {self._config.master} did not answer a moment ago")
        answer = call(*arguments)
        codes = answer if isinstance(answer, list) else [answer]
        self._failed_at = now if NOT_LISTENING in codes else None
        if self._failed_at is not None:
            raise LeaseError(f"Mooncake's master at {self._config.master} does not answer")
        return answer


def _greet(config: MooncakeStoreConfig) -> None:
    """The library tries for minutes where no master is."""
    host, _, port = config.master.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=config.timeout_s).close()
    except OSError as error:
        raise ConnectorUnavailable(
            f"connector=mooncake_store: no mooncake_master answers at {config.master} ({error}); start it first"
        ) from error
