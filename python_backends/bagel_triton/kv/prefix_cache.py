"""The prefix cache: sequences that outlive their request, for requests with the same beginning."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from bagel_triton.kv.block_pool import KVCachePool, KVSequence


class PrefixCache:
    """Prefixes by key, evicted least recently used when blocks are needed.

    A key is a digest of everything that determines a prefix's KV, so equal keys mean equal KV
    to the last bit. A cached prefix is a fork: it shares blocks with the sequences it came from
    and those made from it, and copies nothing. Not thread-safe, like the pool.
    """

    def __init__(self, pool: KVCachePool) -> None:
        self._pool = pool
        self._kept: OrderedDict[bytes, KVSequence] = OrderedDict()  # least recently used first
        self._holds = [0] * pool.blocks.count  # references by this cache, of each block
        pool.make_room = self._make_room

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def blocks(self) -> int:
        """Blocks that only this cache holds; they are freed on demand."""
        references = self._pool.blocks.references
        return sum(bool(holds) and holds == references[block] for block, holds in enumerate(self._holds))

    def longest(self, keys: Sequence[bytes]) -> int:
        """Length of the longest cached prefix, in keys; ``keys`` are those of ever longer prefixes."""
        return next((length for length in range(len(keys), 0, -1) if keys[length - 1] in self._kept), 0)

    def take(self, keys: Sequence[bytes]) -> KVSequence:
        """A fork of the prefix cached under the last of ``keys``."""
        self._touch(keys)
        return self._kept[keys[-1]].fork()

    def keep(self, keys: Sequence[bytes], context: KVSequence) -> None:
        """Cache a fork of ``context`` as it is now under the last of ``keys``."""
        if keys[-1] not in self._kept:
            kept = self._kept[keys[-1]] = context.fork()
            for block in kept.blocks:
                self._holds[block] += 1
        self._touch(keys)

    def clear(self) -> None:
        """Evict everything."""
        for key in list(self._kept):
            self._evict(key)

    def _touch(self, keys: Sequence[bytes]) -> None:
        # The shortest last: the end of a chain, whose last blocks are its own, must be evicted first.
        for key in reversed(keys):
            if key in self._kept:
                self._kept.move_to_end(key)

    def _make_room(self, blocks: int) -> None:
        """Evict until ``blocks`` are free, or nothing is left."""
        # Evicting a prefix whose blocks are all in use elsewhere frees nothing, so those go last.
        for in_use_too in (False, True):
            for key in list(self._kept):
                if self._pool.blocks.free >= blocks:
                    return
                if in_use_too or not all(map(self._pool.blocks.shared, self._kept[key].blocks)):
                    self._evict(key)

    def _evict(self, key: bytes) -> None:
        context = self._kept.pop(key)
        for block in context.blocks:
            self._holds[block] -= 1
        context.free()
