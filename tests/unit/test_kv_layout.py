"""Other engines' caches become our store and come back, or are refused."""

from __future__ import annotations

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bagel_triton.kv.layout import Layout, LayoutError, from_store, layout_of, to_store
from bagel_triton.protocol.messages import KVGeometry
from tests.support.kv import GEOMETRY

SIZE = st.integers(1, 4)


def _layers(geometry: KVGeometry, blocks: int, layout: Layout) -> list[Tensor]:
    rest = (geometry.block_tokens, geometry.kv_heads, geometry.head_dim)
    shape = (2, blocks, *rest) if layout == "pair_first" else (blocks, 2, *rest)
    return [torch.randn(shape, dtype=getattr(torch, geometry.dtype)) for _ in range(geometry.layers)]


@pytest.mark.parametrize("layout", ["pair_first", "block_first"])
@given(blocks=st.integers(1, 5), layers=SIZE, heads=SIZE, width=SIZE, size=SIZE)
def test_a_slot_of_the_store_is_its_place_in_the_engines_cache(
    layout: Layout, blocks: int, layers: int, heads: int, width: int, size: int
) -> None:
    geometry = KVGeometry(layers, heads, width, size, "float32")
    theirs = _layers(geometry, blocks, layout)
    store = to_store(theirs, geometry, layout)
    assert store.shape == (layers, 2, blocks * size, heads, width)
    for layer in range(layers):
        for side in range(2):
            for slot in range(blocks * size):
                block, offset = divmod(slot, size)
                place = (side, block, offset) if layout == "pair_first" else (block, side, offset)
                assert torch.equal(store[layer, side, slot], theirs[layer][place])
    assert all(torch.equal(a, b) for a, b in zip(from_store(store, geometry, layout), theirs, strict=True))


@pytest.mark.parametrize("layout", ["pair_first", "block_first"])
@pytest.mark.parametrize("blocks", [1, 3, 7])
def test_the_shape_tells_the_layout(layout: Layout, blocks: int) -> None:
    theirs = _layers(GEOMETRY, blocks, layout)
    assert layout_of(theirs[0].shape, GEOMETRY) == layout
    assert torch.equal(to_store(theirs, GEOMETRY), to_store(theirs, GEOMETRY, layout))


def test_two_blocks_are_refused_unless_the_layout_is_named() -> None:
    theirs = _layers(GEOMETRY, 2, "block_first")
    with pytest.raises(LayoutError, match=r"shape \[2, 2, 4, 1, 4\] may be of either layout: name it"):
        to_store(theirs, GEOMETRY)
    store = to_store(theirs, GEOMETRY, "block_first")
    assert torch.equal(store[0, 1, :4], theirs[0][0, 1])


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (
            (3, 3, 4, 1, 4),
            r"\[3, 3, 4, 1, 4\] is not allowed; allowed: \[2, blocks, 4, 1, 4\] or \[blocks, 2, 4, 1, 4\]",
        ),
        ((2, 3, 1, 4, 4), r"is not allowed"),
        ((2, 3, 16), r"is not allowed"),
    ],
)
def test_a_shape_of_neither_layout_is_refused(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        to_store([torch.zeros(shape)] * 2, GEOMETRY)


def test_a_layout_that_is_named_wrongly_is_refused() -> None:
    with pytest.raises(LayoutError, match="is pair_first, not block_first"):
        to_store(_layers(GEOMETRY, 3, "pair_first"), GEOMETRY, "block_first")


def test_other_numbers_of_layers_and_dtypes_are_refused() -> None:
    theirs = _layers(GEOMETRY, 3, "pair_first")
    with pytest.raises(LayoutError, match="1 layers are not allowed; allowed: 2"):
        to_store(theirs[:1], GEOMETRY)
    with pytest.raises(LayoutError, match=r"layer 1 is torch\.float32 \[2, 2"):
        to_store([theirs[0], theirs[1][:, :2]], GEOMETRY)
    with pytest.raises(LayoutError, match=r"layer 0 is torch\.float32"):
        to_store(theirs, msgspec.structs.replace(GEOMETRY, dtype="bfloat16"))


def test_a_store_that_is_cut_within_a_block_is_refused() -> None:
    with pytest.raises(LayoutError, match="a multiple of 4 slots"):
        from_store(torch.zeros(2, 2, 10, 1, 4), GEOMETRY, "pair_first")
    with pytest.raises(LayoutError, match="a store of"):
        from_store(torch.zeros(2, 2, 8), GEOMETRY, "pair_first")


def test_writing_an_engines_view_writes_the_store() -> None:
    store = torch.zeros(2, 2, 12, 1, 4)
    from_store(store, GEOMETRY, "block_first")[1][2, 0, 3] = 5.0
    assert store[1, 0, 11].eq(5.0).all()
    assert int(store.count_nonzero()) == 4
