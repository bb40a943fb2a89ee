"""``shm``: the pool is a POSIX shared-memory file that both stages map.

A producer creates two files, ``PREFIX_kv_GENERATION`` (the store) and the same with
``_leases``. Their pages are reserved at once, so a full ``/dev/shm`` is an error at start
and never a bus error later.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Self

import numpy as np
from torch import Tensor

from bagel_triton.ipc.shm import SHM_DIRECTORY, reserve
from bagel_triton.kv.block_pool import KVCachePool
from bagel_triton.kv.connectors.base import MappedConsumer, Producer
from bagel_triton.kv.lease import LeaseManager, LeaseTable, Words, table_words
from bagel_triton.kv.store import map_store, token_bytes
from bagel_triton.protocol.errors import LeaseError
from bagel_triton.protocol.messages import KVGeometry, KVHandle


def new_name(prefix: str) -> tuple[str, int]:
    """The name of a new pool and its generation; files an earlier one of this prefix left are removed."""
    for stale in SHM_DIRECTORY.glob(f"{prefix}_kv_*"):
        stale.unlink()
    generation = time.time_ns()
    return f"{prefix}_kv_{generation}", generation


def _reserve(path: Path, size: int) -> None:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        reserve(descriptor, size, "KV cache")
    except MemoryError:
        path.unlink()
        raise
    finally:
        os.close(descriptor)


def _path(handle: KVHandle) -> Path:
    """The store's file, which must be directly in the shared-memory folder."""
    if Path(handle.pool).name != handle.pool:
        raise LeaseError(f"pool {handle.pool!r} of request {handle.request_id} is not a file name")
    return SHM_DIRECTORY / handle.pool


def _gone(handle: KVHandle, error: Exception) -> LeaseError:
    return LeaseError(f"pool {handle.pool} of request {handle.request_id} is gone: {error}")


class SharedWords:
    """The lease words of one pool, in a file that the consumer maps too; ``array`` are the words."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.array: Words = np.memmap(path, dtype=np.int64, mode="r+", shape=(table_words(),))

    @classmethod
    def create(cls, name: str) -> Self:
        """The words of a new pool; raises :class:`MemoryError`."""
        path = SHM_DIRECTORY / f"{name}_leases"
        _reserve(path, table_words() * 8)
        return cls(path)

    @classmethod
    def open(cls, handle: KVHandle) -> Self:
        """The words of the pool that ``handle`` names; raises :class:`LeaseError` if it is gone."""
        path = _path(handle)
        try:
            return cls(path.with_name(f"{path.name}_leases"))
        except (OSError, ValueError) as error:
            raise _gone(handle, error) from error

    def unlink(self) -> None:
        """Remove the file; existing mappings stay readable."""
        self._path.unlink(missing_ok=True)


class ShmProducer(Producer):
    """A pool of ``blocks`` blocks in shared memory, named after ``prefix``.

    Files that an earlier producer with this prefix left behind are removed.

    Raises:
        MemoryError: ``/dev/shm`` is too small.
    """

    def __init__(self, geometry: KVGeometry, blocks: int, prefix: str) -> None:
        name, generation = new_name(prefix)
        self._store_path = SHM_DIRECTORY / name
        _reserve(self._store_path, blocks * geometry.block_tokens * token_bytes(geometry))
        try:
            self._words = SharedWords.create(name)
        except MemoryError:
            self._store_path.unlink()
            raise
        self.pool = KVCachePool(map_store(self._store_path, geometry), geometry)
        self.leases = LeaseManager(self.pool, LeaseTable(self._words.array), name, "shm", generation)

    def close(self) -> None:
        """End all leases and unlink both files; existing mappings stay readable."""
        self.leases.close()
        self._store_path.unlink(missing_ok=True)
        self._words.unlink()


class ShmConsumer(MappedConsumer):
    """Maps pools by name and keeps the mapping of the newest."""

    def __init__(self) -> None:
        self._attached: tuple[str, Tensor, LeaseTable] | None = None

    def attach(self, handle: KVHandle) -> tuple[Tensor, LeaseTable]:
        """The mapped store and table of the handle's pool."""
        if self._attached is None or self._attached[0] != handle.pool:
            path = _path(handle)
            try:
                store = map_store(path, handle.geometry)
            except (OSError, RuntimeError) as error:
                raise _gone(handle, error) from error
            self._attached = (handle.pool, store, LeaseTable(SharedWords.open(handle).array))
        return self._attached[1], self._attached[2]

    def close(self) -> None:
        """Drop the mapping."""
        self._attached = None
