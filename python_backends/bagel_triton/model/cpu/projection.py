"""Products with the weights of plain and of quantised layers, whose rows do not depend on their batch.

A quantised weight is decoded a few output rows at a time, which stay in the core's cache until they are used: no
dense copy of a layer is ever in memory.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from bagel_triton.model.cpu.row_stable import add_linear, few_rows_linear, linear
from bagel_triton.model.quantization import QuantizedLinear, encode_fp8, encode_int8

WEIGHTS = 1 << 19  # that are decoded at once


def project(
    x: Tensor,
    layer: nn.Linear | QuantizedLinear,
    rows: slice = slice(None),
    out: Tensor | None = None,
    few: bool = False,
) -> Tensor:
    """The output rows ``rows`` of a linear ``layer``, with their bias, into ``out`` if given.

    x [tokens, in] -> [tokens, rows]. Tokens of a kind of which there are usually ``few`` have a faster product.
    """
    bias = None if layer.bias is None else layer.bias[rows]
    if not isinstance(layer, QuantizedLinear):
        if few:
            product = few_rows_linear(x, layer.weight[rows], bias)
            return product if out is None else out.copy_(product)
        return linear(x, layer.weight[rows], bias, out)
    start, stop, _ = rows.indices(layer.out_features)
    if out is None:
        out = x.new_empty(len(x), stop - start)
    for part, product in _products(x, layer, start, stop):
        torch.add(product, bias[part], out=out[:, part]) if bias is not None else out[:, part].copy_(product)
    return out


def add_projection(x: Tensor, layer: nn.Linear | QuantizedLinear, out: Tensor, few: bool = False) -> None:
    """Add a linear ``layer`` without a bias of x [tokens, in] to ``out`` [tokens, out]; ``few`` as above."""
    if not isinstance(layer, QuantizedLinear):
        if few:
            out += few_rows_linear(x, layer.weight)
        else:
            add_linear(x, layer.weight, out)
        return
    for part, product in _products(x, layer, 0, layer.out_features):
        out[:, part].add_(product)


def _products(x: Tensor, layer: QuantizedLinear, start: int, stop: int) -> Iterator[tuple[slice, Tensor]]:
    """x [tokens, in] times parts of the weight's rows ``start`` to ``stop``; each with its place among these."""
    form, step = layer.form, max(WEIGHTS // layer.in_features, 16)
    codes, scale = x, None
    if form.activations:
        codes, scale = encode_int8(x) if form.storage == "int8" else encode_fp8(x)
        if form.storage == "fp8":
            codes = form.codes(codes, torch.float32)
    for first in range(start, stop, step):
        rows = slice(first, min(first + step, stop))
        place = slice(rows.start - start, rows.stop - start)
        if scale is None:
            yield place, linear(x, layer.dense(x.dtype, rows))
            continue
        weight = layer.weight[rows]
        if form.storage == "int8":  # sums of integers are exact, in whatever order
            product = torch._int_mm(codes, weight.t()).float()
        else:
            product = linear(codes, form.codes(weight, torch.float32))
        yield place, product.mul_(scale).mul_(layer.weight_scale[rows].t()).to(x.dtype)
