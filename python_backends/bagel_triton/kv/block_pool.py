"""The KV cache: fixed-size blocks of tokens, reference-counted, the sequences made of them, and cached prefixes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bagel_triton.kv.store import slots_of
from bagel_triton.protocol.messages import KVGeometry


class KVCacheFull(Exception):
    """No blocks are free now; some return when requests and leases end."""


class BlockAllocator:
    """Reference counts of ``count`` blocks (``references``, by block). Not thread-safe: one thread owns a pool."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._free = list(range(count - 1, -1, -1))  # a stack: low blocks first, in order
        self.references = [0] * count

    @property
    def free(self) -> int:
        """Blocks that can be allocated now."""
        return len(self._free)

    @property
    def used(self) -> int:
        """Blocks that a sequence or a lease holds."""
        return self.count - len(self._free)

    def allocate(self, number: int) -> list[int]:
        """``number`` blocks with one reference each; all of them or :class:`KVCacheFull`."""
        if number > len(self._free):
            raise KVCacheFull(f"{number} blocks wanted, {len(self._free)} of {self.count} free")
        taken = [self._free.pop() for _ in range(number)]
        for block in taken:
            self.references[block] = 1
        return taken

    def retain(self, blocks: Sequence[int]) -> None:
        """Add a reference to each block."""
        for block in blocks:
            if not self.references[block]:
                raise ValueError(f"block {block} is free and cannot be shared")
            self.references[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Remove a reference from each block; the last one frees it."""
        if twice := [block for block in blocks if not self.references[block]]:
            raise ValueError(f"block {twice[0]} is free already")
        freed = []
        for block in blocks:
            self.references[block] -= 1
            if not self.references[block]:
                freed.append(block)
        if freed:
            # Sorted, so that the next sequences get consecutive blocks and are read without a gather.
            self._free.extend(freed)
            self._free.sort(reverse=True)

    def shared(self, block: int) -> bool:
        """Whether more than one sequence holds ``block``."""
        return self.references[block] > 1


class KVSequence:
    """One branch's tokens in the pool: a list of blocks that forks without a copy."""

    def __init__(
        self, pool: KVCachePool, blocks: list[int] | None = None, tokens: int = 0, next_position: int = 0
    ) -> None:
        self._pool = pool
        self.blocks = blocks or []
        self.tokens = tokens
        self.next_position = next_position

    def fork(self) -> KVSequence:
        """A sequence with the same past; the two grow apart from here."""
        return self.fork_at(self.tokens, self.next_position)

    def fork_at(self, tokens: int, next_position: int) -> KVSequence:
        """A sequence with this one's first ``tokens``, which end before RoPE position ``next_position``."""
        blocks = self.blocks[: self._pool.blocks_for(tokens)]
        self._pool.blocks.retain(blocks)
        return KVSequence(self._pool, blocks, tokens, next_position)

    def extend(self, tokens: int) -> Tensor:
        """Append ``tokens``; their slots, [tokens] int64, on the CPU.

        A partly filled last block that another sequence shares is copied first.

        Raises:
            KVCacheFull: nothing has changed.
        """
        pool, size = self._pool, self._pool.geometry.block_tokens
        filled = self.tokens % size
        missing = -(-(self.tokens + tokens) // size) - len(self.blocks)
        pool.make_room(missing + (bool(filled) and pool.blocks.shared(self.blocks[-1])))
        copy_tail = bool(filled) and pool.blocks.shared(self.blocks[-1])  # which making room may have ended
        fresh = pool.blocks.allocate(missing + copy_tail)
        if copy_tail:
            tail, copy = self.blocks[-1], fresh.pop(0)
            pool.copy(tail, copy, filled)
            self.blocks[-1] = copy
            pool.blocks.release([tail])
        self.blocks.extend(fresh)
        start, self.tokens = self.tokens, self.tokens + tokens
        return pool.slots(self.blocks, start, self.tokens)

    def free(self) -> None:
        """Free the blocks; the sequence is empty afterwards."""
        blocks, self.blocks, self.tokens = self.blocks, [], 0
        self._pool.blocks.release(blocks)


class KVCachePool:
    """A store, ``[layers, 2, blocks * block_tokens, kv_heads, head_dim]``, cut into blocks.

    ``make_room`` is called with a number of blocks before they are allocated. It may evict
    cached prefixes to free them. ``copied`` is called with the slots of each copy inside the store, from and to.
    """

    def __init__(self, store: Tensor, geometry: KVGeometry) -> None:
        self.store, self.geometry = store, geometry
        self.make_room: Callable[[int], None] = lambda blocks: None
        self.copied: Callable[[slice, slice], None] = lambda source, target: None
        self.blocks = BlockAllocator(store.shape[2] // geometry.block_tokens)

    @property
    def capacity(self) -> int:
        """Tokens the whole pool holds."""
        return self.blocks.count * self.geometry.block_tokens

    def blocks_for(self, tokens: int) -> int:
        """Blocks that a new sequence of ``tokens`` takes."""
        return -(-tokens // self.geometry.block_tokens)

    def copy(self, source: int, target: int, tokens: int) -> None:
        """Copy the first ``tokens`` of block ``source`` to ``target``."""
        size = self.geometry.block_tokens
        slots = [slice(block * size, block * size + tokens) for block in (source, target)]
        self.store[:, :, slots[1]] = self.store[:, :, slots[0]]
        self.copied(*slots)

    def slots(self, blocks: Sequence[int], start: int, stop: int) -> Tensor:
        """Slots of the tokens ``start:stop`` of ``blocks``, [stop - start] int64, on the CPU."""
        size = self.geometry.block_tokens
        index = torch.arange(start, stop)
        return torch.tensor(blocks, dtype=torch.int64)[index // size] * size + index % size

    def read_slots(self, context: KVSequence) -> slice | Tensor:
        """Slots of a whole sequence, for :class:`~bagel_triton.kv.store.PagedStep`."""
        slots = slots_of(context.blocks, context.tokens, self.geometry.block_tokens)
        return slots if isinstance(slots, slice) else slots.to(self.store.device)


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
