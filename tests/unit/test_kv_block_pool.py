"""Blocks, and contexts that fork without a copy and grow apart without seeing each other."""

from __future__ import annotations

import pytest
import torch

from bagel_triton.kv.block_pool import BlockAllocator, KVCacheFull, KVSequence
from tests.support.kv import GEOMETRY, append, contents_of, new_arena, read

SIZE = GEOMETRY.block_tokens


def test_lowest_blocks_are_given_first_whatever_the_order_of_their_return() -> None:
    blocks = BlockAllocator(8)
    assert blocks.allocate(6) == [0, 1, 2, 3, 4, 5]
    blocks.release([4, 1])
    blocks.release([3])
    assert blocks.allocate(4) == [1, 3, 4, 6]
    assert (blocks.used, blocks.free) == (7, 1)


def test_a_full_arena_gives_nothing_and_takes_nothing() -> None:
    blocks = BlockAllocator(3)
    blocks.allocate(2)
    with pytest.raises(KVCacheFull, match="2 blocks wanted, 1 of 3 free"):
        blocks.allocate(2)
    assert blocks.allocate(1) == [2]


def test_a_shared_block_is_free_when_its_last_holder_lets_go() -> None:
    blocks = BlockAllocator(2)
    held = blocks.allocate(1)
    blocks.retain(held)
    assert blocks.shared(held[0])
    blocks.release(held)
    assert not blocks.shared(held[0])
    assert blocks.used == 1
    blocks.release(held)
    assert blocks.used == 0


def test_a_free_block_can_neither_be_shared_nor_released() -> None:
    blocks = BlockAllocator(2)
    held = blocks.allocate(1)
    blocks.release(held)
    with pytest.raises(ValueError, match="block 0 is free"):
        blocks.release(held)
    with pytest.raises(ValueError, match="block 1 is free"):
        blocks.retain([1])
    assert blocks.allocate(2) == [0, 1]


@pytest.mark.parametrize("sizes", [[1], [SIZE], [SIZE + 1], [1, 1, SIZE, 2 * SIZE + 3], [SIZE, SIZE], [3, 0, 2]])
def test_tokens_come_back_in_order_whatever_the_portions(sizes: list[int]) -> None:
    pool = new_arena(8)
    context, labels = KVSequence(pool), []
    for size in sizes:
        portion = list(range(len(labels), len(labels) + size))
        append(pool, context, portion)
        labels += portion
    assert context.tokens == len(labels)
    assert len(context.blocks) == pool.blocks_for(len(labels))
    assert torch.equal(read(pool, context), contents_of(labels))


def test_consecutive_blocks_are_read_without_a_gather() -> None:
    pool = new_arena(8)
    first, second = KVSequence(pool), KVSequence(pool)
    append(pool, first, range(5))
    append(pool, second, range(5, 10))
    assert pool.read_slots(second) == slice(2 * SIZE, 2 * SIZE + 5)
    first.free()
    third = KVSequence(pool)
    append(pool, third, range(10, 15))
    assert pool.read_slots(third) == slice(0, 5)


def test_scattered_blocks_hold_their_tokens_in_order() -> None:
    pool = new_arena(8)
    first, second = KVSequence(pool), KVSequence(pool)
    for start in range(0, 12, SIZE):
        append(pool, first, range(start, start + SIZE))
        append(pool, second, range(100 + start, 100 + start + SIZE))
    assert first.blocks == [0, 2, 4]
    assert torch.equal(read(pool, first), contents_of(range(12)))
    assert torch.equal(read(pool, second), contents_of(range(100, 112)))


def test_a_fork_costs_no_block_and_reads_the_same_past() -> None:
    pool = new_arena(4)
    context = KVSequence(pool)
    append(pool, context, range(6))
    fork = context.fork()
    assert pool.blocks.used == 2
    assert (fork.tokens, fork.next_position) == (6, 6)
    assert torch.equal(read(pool, fork), contents_of(range(6)))


@pytest.mark.parametrize("past", [1, SIZE - 1, SIZE, SIZE + 1, 2 * SIZE])
def test_forks_grow_apart_without_seeing_each_other(past: int) -> None:
    pool = new_arena(16)
    context = KVSequence(pool)
    append(pool, context, range(past))
    forks = [context.fork() for _ in range(3)]
    labels = [list(range(past)) for _ in forks]
    for step in range(SIZE + 1):
        for number, fork in enumerate(forks):
            token = 100 * (number + 1) + step
            append(pool, fork, [token])
            labels[number].append(token)
    for fork, expected in zip(forks, labels, strict=True):
        assert torch.equal(read(pool, fork), contents_of(expected))
    assert torch.equal(read(pool, context), contents_of(range(past)))


def test_only_a_partly_filled_shared_block_is_copied() -> None:
    pool = new_arena(8)
    full, partial = KVSequence(pool), KVSequence(pool)
    append(pool, full, range(SIZE))
    append(pool, partial, range(SIZE + 1))
    fork_of_full, fork_of_partial = full.fork(), partial.fork()
    append(pool, fork_of_full, [50])
    append(pool, fork_of_partial, [60])
    assert fork_of_full.blocks[:1] == full.blocks
    assert fork_of_partial.blocks[0] == partial.blocks[0]
    assert fork_of_partial.blocks[1] != partial.blocks[1]
    # The copy left the tail to its last holder, who now writes in place.
    before = partial.blocks[1]
    append(pool, partial, [61])
    assert partial.blocks[1] == before


def test_all_blocks_return_whatever_the_order_of_release() -> None:
    pool = new_arena(8)
    context = KVSequence(pool)
    append(pool, context, range(6))
    fork = context.fork()
    append(pool, fork, range(6, 12))
    context.free()
    assert torch.equal(read(pool, fork), contents_of(range(12)))
    context.free()  # nothing is left to give back
    fork.free()
    assert pool.blocks.used == 0
    assert pool.blocks.allocate(8) == list(range(8))


@pytest.mark.parametrize(("blocks", "wanted"), [(3, 8), (2, 1)])
def test_no_room_to_grow_changes_nothing(blocks: int, wanted: int) -> None:
    """``(2, 1)``: one token fits the fork's last block, but not the copy it needs first."""
    pool = new_arena(blocks)
    context = KVSequence(pool)
    append(pool, context, range(6))
    fork = context.fork()
    with pytest.raises(KVCacheFull):
        fork.extend(wanted)
    assert (fork.tokens, fork.blocks) == (6, context.blocks)
    assert pool.blocks.free == blocks - 2
    assert torch.equal(read(pool, fork), contents_of(range(6)))
    fork.free()
    append(pool, context, [6])
    assert torch.equal(read(pool, context), contents_of(range(7)))
