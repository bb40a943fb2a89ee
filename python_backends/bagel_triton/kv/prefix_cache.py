"""Contexts that outlive their request, for requests that begin alike."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from bagel_triton.kv.block_pool import KVCachePool, KVSequence


class PrefixCache:
    """Finished beginnings of contexts by key; those used longest ago go when blocks are needed.

    A key stands for everything that determined a context's numbers, so equal keys mean equal
    keys and values to the last bit. What is kept shares its blocks with whoever made it and
    whoever takes it: keeping copies nothing, and a block is free when the last holder lets go.
    Owned by the pool's thread, like the pool.
    """

    def __init__(self, pool: KVCachePool) -> None:
        self._pool = pool
        self._kept: OrderedDict[bytes, KVSequence] = OrderedDict()  # least recently used first
        self._holds = [0] * pool.blocks.count  # of each block, by what is kept
        pool.make_room = self._make_room

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def blocks(self) -> int:
        """Blocks that nothing but this cache holds: free to whoever needs them."""
        references = self._pool.blocks.references
        return sum(bool(holds) and holds == references[block] for block, holds in enumerate(self._holds))

    def longest(self, keys: Sequence[bytes]) -> int:
        """How many of ``keys``, each of a longer beginning, lead to the longest that is kept; 0 for none."""
        return next((length for length in range(len(keys), 0, -1) if keys[length - 1] in self._kept), 0)

    def take(self, keys: Sequence[bytes]) -> KVSequence:
        """A fork of what is kept under the last of ``keys``."""
        self._touch(keys)
        return self._kept[keys[-1]].fork()

    def keep(self, keys: Sequence[bytes], context: KVSequence) -> None:
        """Keep what ``context`` holds now under the last of ``keys``."""
        if keys[-1] not in self._kept:
            kept = self._kept[keys[-1]] = context.fork()
            for block in kept.blocks:
                self._holds[block] += 1
        self._touch(keys)

    def clear(self) -> None:
        """Let go of everything."""
        for key in list(self._kept):
            self._drop(key)

    def _touch(self, keys: Sequence[bytes]) -> None:
        # The shortest last: what is dropped first must be the end of a chain, whose blocks are its own.
        for key in reversed(keys):
            if key in self._kept:
                self._kept.move_to_end(key)

    def _make_room(self, blocks: int) -> None:
        """Drop until ``blocks`` are free, or nothing is left."""
        # One whose blocks are all in use by others would be lost for nothing: those go last.
        for in_use_too in (False, True):
            for key in list(self._kept):
                if self._pool.blocks.free >= blocks:
                    return
                if in_use_too or not all(map(self._pool.blocks.shared, self._kept[key].blocks)):
                    self._drop(key)

    def _drop(self, key: bytes) -> None:
        context = self._kept.pop(key)
        for block in context.blocks:
            self._holds[block] -= 1
        context.free()
