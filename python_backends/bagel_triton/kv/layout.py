"""Other engines' layouts of keys and values, to ours and back.

Ours, in every store and so on the wire, is ``[layers, 2, slots, kv_heads, head_dim]``: one
tensor, keys at index 0, values at 1, slot ``block * block_tokens + offset``. Engines with a
paged cache keep a tensor a layer, in one of two forms that differ in where the pair of keys
and values stands.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from bagel_triton.kv.store import store_shape
from bagel_triton.protocol.messages import KVGeometry

Layout = Literal["pair_first", "block_first"]
"""``pair_first``: [2, blocks, block_tokens, kv_heads, head_dim]; ``block_first``: [blocks, 2, ...]."""


class LayoutError(ValueError):
    """A shape is not of any layout known here, or of more than one; the message shows it."""


def layout_of(shape: Sequence[int], geometry: KVGeometry, named: Layout | None = None) -> Layout:
    """The layout of one layer's tensor, ``named`` by its owner or read off its shape.

    Raises:
        LayoutError: of neither layout, of the one that is not named, or, with two blocks and
            no name, of both.
    """
    rest = (geometry.block_tokens, geometry.kv_heads, geometry.head_dim)
    if len(shape) != 5 or tuple(shape[2:]) != rest or 2 not in shape[:2]:
        after = ", ".join(map(str, rest))
        raise LayoutError(
            f"a layer of shape {list(shape)} is not allowed; allowed: [2, blocks, {after}] or [blocks, 2, {after}]"
        )
    if shape[0] == shape[1]:
        if named is None:
            raise LayoutError(f"a layer of shape {list(shape)} may be of either layout: name it")
        return named
    found: Layout = "pair_first" if shape[0] == 2 else "block_first"
    if named not in (None, found):
        raise LayoutError(f"a layer of shape {list(shape)} is {found}, not {named}")
    return found


def to_store(layers: Sequence[Tensor], geometry: KVGeometry, layout: Layout | None = None) -> Tensor:
    """One store, a copy, of an engine's tensors; ``layout`` is read off their shape where it is None.

    Raises:
        LayoutError: a number, shape or dtype of tensors that is not the geometry's, or an
            ambiguous shape.
    """
    if len(layers) != geometry.layers:
        raise LayoutError(f"{len(layers)} layers are not allowed; allowed: {geometry.layers}")
    dtype = getattr(torch, geometry.dtype)
    for index, layer in enumerate(layers):
        if layer.shape != layers[0].shape or layer.dtype != dtype:
            raise LayoutError(
                f"layer {index} is {layer.dtype} {list(layer.shape)}; allowed: {dtype} {list(layers[0].shape)}"
            )
    found = layout_of(layers[0].shape, geometry, layout)
    pairs = [layer if found == "pair_first" else layer.transpose(0, 1) for layer in layers]
    return torch.stack(pairs).view(store_shape(geometry, pairs[0].shape[1] * geometry.block_tokens))


def from_store(store: Tensor, geometry: KVGeometry, layout: Layout) -> list[Tensor]:
    """An engine's tensors of a store, one a layer: views of it, so writing one writes the store.

    Raises:
        LayoutError: a shape or dtype that is not the geometry's, or slots that are no whole
            number of blocks.
    """
    slots = store.shape[2] if store.dim() == 5 else 0
    expected = store_shape(geometry, slots)
    if tuple(store.shape) != expected or slots % geometry.block_tokens or str(store.dtype) != f"torch.{geometry.dtype}":
        raise LayoutError(
            f"a store of {store.dtype} {list(store.shape)} is not allowed; allowed: torch.{geometry.dtype} "
            f"{list(expected)} with a multiple of {geometry.block_tokens} slots"
        )
    pairs = store.unflatten(2, (slots // geometry.block_tokens, geometry.block_tokens))
    return [pair if layout == "pair_first" else pair.transpose(0, 1) for pair in pairs]
