"""Matrix products whose rows do not depend on the other rows of the batch.

A CPU matrix product chooses its kernel, and with it the order of its sums, by the
number of rows: few rows, or a long inner dimension, round differently. Two rules, which
cost 2 % of a product at most, make every row bit-identical whatever it is packed with,
on a CPU with AVX-512: never fewer than ``MIN_ROWS`` rows, never more than ``MAX_INNER`` of
the inner dimension at once. ``tests/unit/test_linear.py`` holds the machine it runs on to it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

MIN_ROWS = 16
MAX_INNER = 512
VECTOR = 16  # float32 of the widest registers
TWO_VECTORS = 64  # of the narrowest numbers, which are what an elementwise operation takes at a time
ONE_SHARE = 1 << 15  # numbers that an elementwise operation leaves to one thread
CACHED = 1 << 17  # numbers of each operand that stay in a core's cache from one operation to the next


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``, into ``out`` where one is given; x [rows, in], weight [out, in] -> [rows, out]."""
    if x.device.type != "cpu":
        return _product(x, weight, bias, out)
    rows = len(x)
    if rows < MIN_ROWS:
        padded = linear(_padded(x), weight, bias)[:rows]
        return padded if out is None else out.copy_(padded)
    if x.shape[1] <= MAX_INNER:
        return _product(x, weight, bias, out)
    first, *rest = _pieces(x.shape[1])
    out = _product(x[:, first], weight[:, first], bias, out)
    for piece in rest:
        out.addmm_(x[:, piece], weight[:, piece].t())
    return out


def add_linear(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """``x @ weight.T`` on top of what is in ``out`` [rows, out]; x [rows, in], weight [out, in]."""
    rows = len(x)
    if x.device.type == "cpu" and rows < MIN_ROWS:
        padded = _padded(out)
        add_linear(_padded(x), weight, padded)
        out.copy_(padded[:rows])
    elif x.device.type != "cpu" or x.shape[1] <= MAX_INNER:
        out.addmm_(x, weight.t())
    else:
        for piece in _pieces(x.shape[1]):
            out.addmm_(x[:, piece], weight[:, piece].t())


def _padded(x: Tensor) -> Tensor:
    return F.pad(x, (0, 0, 0, MIN_ROWS - len(x)))


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
    if bias is None:
        return torch.mm(x, weight.t(), out=out)
    return torch.addmm(bias, x, weight.t(), out=out)


def _pieces(inner: int) -> list[slice]:
    """What of the inner dimension is summed at once: pieces of about one size, whole vectors each."""
    count = -(-inner // MAX_INNER)
    step = -(-inner // (count * VECTOR)) * VECTOR
    return [slice(start, min(start + step, inner)) for start in range(0, inner, step)]


def silu_product(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up``, elementwise, in place of ``gate``; [rows, inner] both. Each element's bits are its own.

    torch's SiLU on a CPU rounds what does not fill its vectors otherwise, at the end of every
    thread's share: there is none where whole vectors are few enough for one thread. Rows of
    other widths take ``exp`` and a division instead, which have no such ends.
    """
    if gate.device.type != "cpu":
        return F.silu(gate, inplace=True).mul_(up)
    inner = gate.shape[1]
    rows = max((CACHED if torch.get_num_threads() == 1 else ONE_SHARE) // inner, 1)
    whole_vectors = inner % TWO_VECTORS == 0 and inner <= ONE_SHARE
    for part, factor in zip(gate.split(rows), up.split(rows), strict=True):
        if whole_vectors:
            F.silu(part, inplace=True).mul_(factor)
        else:
            part.div_(torch.neg(part).exp_().add_(1.0)).mul_(factor)
    return gate
