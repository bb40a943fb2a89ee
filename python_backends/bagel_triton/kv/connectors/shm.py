"""``shm``: the arena is a POSIX shared-memory file that both stages map.

A producer makes two files, ``PREFIX_kv_GENERATION`` (the store) and the same with
``_leases``. Their pages are reserved when they are made, so a full ``/dev/shm`` is an
error at start and never a bus error later.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bagel_triton.errors import LeaseError
from bagel_triton.kv.arena import KVArena
from bagel_triton.kv.connectors.base import MappedConsumer, Producer
from bagel_triton.kv.lease import LeaseBook, LeaseTable, Words, table_words
from bagel_triton.kv.store import store_shape, token_bytes
from bagel_triton.messages import ContextHandle, KVGeometry
from bagel_triton.shm_file import SHM_DIRECTORY, reserve


def _reserve(path: Path, size: int) -> None:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        reserve(descriptor, size, "KV arena")
    except MemoryError:
        path.unlink()
        raise
    finally:
        os.close(descriptor)


def _map_store(path: Path, geometry: KVGeometry) -> Tensor:
    dtype = getattr(torch, geometry.dtype)
    elements = path.stat().st_size // dtype.itemsize
    slots = path.stat().st_size // token_bytes(geometry)
    flat = torch.from_file(str(path), shared=True, size=elements, dtype=dtype)
    return flat.view(store_shape(geometry, slots))


def _map_words(path: Path) -> Words:
    return np.memmap(path, dtype=np.int64, mode="r+", shape=(table_words(),))


class ShmProducer(Producer):
    """An arena of ``blocks`` blocks in shared memory, named after ``prefix``.

    Files that an earlier producer with this prefix left behind are removed.

    Raises:
        MemoryError: ``/dev/shm`` is too small.
    """

    def __init__(self, geometry: KVGeometry, blocks: int, prefix: str) -> None:
        for stale in SHM_DIRECTORY.glob(f"{prefix}_kv_*"):
            stale.unlink()
        generation = time.time_ns()
        name = f"{prefix}_kv_{generation}"
        self._store_path, self._words_path = SHM_DIRECTORY / name, SHM_DIRECTORY / f"{name}_leases"
        _reserve(self._store_path, blocks * geometry.block_tokens * token_bytes(geometry))
        try:
            _reserve(self._words_path, table_words() * 8)
        except MemoryError:
            self._store_path.unlink()
            raise
        self.arena = KVArena(_map_store(self._store_path, geometry), geometry)
        self.leases = LeaseBook(self.arena, LeaseTable(_map_words(self._words_path)), name, "shm", generation)

    def close(self) -> None:
        """End all leases and unlink both files; existing mappings stay readable."""
        self.leases.close()
        self._store_path.unlink(missing_ok=True)
        self._words_path.unlink(missing_ok=True)


class ShmConsumer(MappedConsumer):
    """Maps arenas by name and keeps the mapping of the newest."""

    def __init__(self) -> None:
        self._attached: tuple[str, Tensor, LeaseTable] | None = None

    def attach(self, handle: ContextHandle) -> tuple[Tensor, LeaseTable]:
        """The mapped store and table of the handle's arena."""
        if self._attached is None or self._attached[0] != handle.arena:
            path = SHM_DIRECTORY / handle.arena
            try:
                store = _map_store(path, handle.geometry)
                table = LeaseTable(_map_words(path.with_name(f"{handle.arena}_leases")))
            except (OSError, RuntimeError) as error:
                raise LeaseError(f"arena {handle.arena} of request {handle.request_id} is gone: {error}") from error
            self._attached = (handle.arena, store, table)
        return self._attached[1], self._attached[2]

    def close(self) -> None:
        """Drop the mapping."""
        self._attached = None
