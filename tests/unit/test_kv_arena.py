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
    arena = new_arena(8)
    context, labels = KVSequence(arena), []
    for size in sizes:
        portion = list(range(len(labels), len(labels) + size))
        append(arena, context, portion)
        labels += portion
    assert context.tokens == len(labels)
    assert len(context.blocks) == arena.blocks_for(len(labels))
    assert torch.equal(read(arena, context), contents_of(labels))


def test_consecutive_blocks_are_read_without_a_gather() -> None:
    arena = new_arena(8)
    first, second = KVSequence(arena), KVSequence(arena)
    append(arena, first, range(5))
    append(arena, second, range(5, 10))
    assert arena.read_slots(second) == slice(2 * SIZE, 2 * SIZE + 5)
    first.free()
    third = KVSequence(arena)
    append(arena, third, range(10, 15))
    assert arena.read_slots(third) == slice(0, 5)


def test_scattered_blocks_hold_their_tokens_in_order() -> None:
    arena = new_arena(8)
    first, second = KVSequence(arena), KVSequence(arena)
    for start in range(0, 12, SIZE):
        append(arena, first, range(start, start + SIZE))
        append(arena, second, range(100 + start, 100 + start + SIZE))
    assert first.blocks == [0, 2, 4]
    assert torch.equal(read(arena, first), contents_of(range(12)))
    assert torch.equal(read(arena, second), contents_of(range(100, 112)))


def test_a_fork_costs_no_block_and_reads_the_same_past() -> None:
    arena = new_arena(4)
    context = KVSequence(arena)
    append(arena, context, range(6))
    fork = context.fork()
    assert arena.blocks.used == 2
    assert (fork.tokens, fork.next_position) == (6, 6)
    assert torch.equal(read(arena, fork), contents_of(range(6)))


@pytest.mark.parametrize("past", [1, SIZE - 1, SIZE, SIZE + 1, 2 * SIZE])
def test_forks_grow_apart_without_seeing_each_other(past: int) -> None:
    arena = new_arena(16)
    context = KVSequence(arena)
    append(arena, context, range(past))
    forks = [context.fork() for _ in range(3)]
    labels = [list(range(past)) for _ in forks]
    for step in range(SIZE + 1):
        for number, fork in enumerate(forks):
            token = 100 * (number + 1) + step
            append(arena, fork, [token])
            labels[number].append(token)
    for fork, expected in zip(forks, labels, strict=True):
        assert torch.equal(read(arena, fork), contents_of(expected))
    assert torch.equal(read(arena, context), contents_of(range(past)))


def test_only_a_partly_filled_shared_block_is_copied() -> None:
    arena = new_arena(8)
    full, partial = KVSequence(arena), KVSequence(arena)
    append(arena, full, range(SIZE))
    append(arena, partial, range(SIZE + 1))
    fork_of_full, fork_of_partial = full.fork(), partial.fork()
    append(arena, fork_of_full, [50])
    append(arena, fork_of_partial, [60])
    assert fork_of_full.blocks[:1] == full.blocks
    assert fork_of_partial.blocks[0] == partial.blocks[0]
    assert fork_of_partial.blocks[1] != partial.blocks[1]
    # The copy left the tail to its last holder, who now writes in place.
    before = partial.blocks[1]
    append(arena, partial, [61])
    assert partial.blocks[1] == before


def test_all_blocks_return_whatever_the_order_of_release() -> None:
    arena = new_arena(8)
    context = KVSequence(arena)
    append(arena, context, range(6))
    fork = context.fork()
    append(arena, fork, range(6, 12))
    context.free()
    assert torch.equal(read(arena, fork), contents_of(range(12)))
    context.free()  # nothing is left to give back
    fork.free()
    assert arena.blocks.used == 0
    assert arena.blocks.allocate(8) == list(range(8))


@pytest.mark.parametrize(("blocks", "wanted"), [(3, 8), (2, 1)])
def test_no_room_to_grow_changes_nothing(blocks: int, wanted: int) -> None:
    """``(2, 1)``: one token fits the fork's last block, but not the copy it needs first."""
    arena = new_arena(blocks)
    context = KVSequence(arena)
    append(arena, context, range(6))
    fork = context.fork()
    with pytest.raises(KVCacheFull):
        fork.extend(wanted)
    assert (fork.tokens, fork.blocks) == (6, context.blocks)
    assert arena.blocks.free == blocks - 2
    assert torch.equal(read(arena, fork), contents_of(range(6)))
    fork.free()
    append(arena, context, [6])
    assert torch.equal(read(arena, context), contents_of(range(7)))
