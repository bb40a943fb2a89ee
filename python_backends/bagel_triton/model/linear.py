"""Matrix products whose rows do not depend on the other rows of the batch.

A CPU matrix product chooses its kernel, and with it the order of its sums, by the
number of rows: few rows, or a long inner dimension, round differently. Two rules, which
cost 2 % of a product at most, make every row bit-identical whatever it is packed with:
never fewer than ``MIN_ROWS`` rows, never more than ``MAX_INNER`` of the inner
dimension at once. ``tests/unit/test_linear.py`` holds the machine it runs on to it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

MIN_ROWS = 16
MAX_INNER = 512
VECTOR = 16  # float32 of the widest registers


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``, into ``out`` where one is given; x [rows, in], weight [out, in] -> [rows, out]."""
    if x.device.type != "cpu":
        return _product(x, weight, bias, out)
    rows, inner = x.shape
    if rows < MIN_ROWS:
        padded = linear(F.pad(x, (0, 0, 0, MIN_ROWS - rows)), weight, bias)[:rows]
        return padded if out is None else out.copy_(padded)
    step = _piece(inner)
    out = _product(x[:, :step], weight[:, :step], bias, out)
    for start in range(step, inner, step):
        stop = start + step
        out.addmm_(x[:, start:stop], weight[:, start:stop].t())
    return out


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
    if bias is None:
        return torch.mm(x, weight.t(), out=out)
    return torch.addmm(bias, x, weight.t(), out=out)


def _piece(inner: int) -> int:
    """How much of the inner dimension is summed at once: pieces of about one size, whole vectors each."""
    pieces = -(-inner // MAX_INNER)
    return -(-inner // (pieces * VECTOR)) * VECTOR


def silu_product(gate: Tensor, up: Tensor, spare: Tensor) -> Tensor:
    """``silu(gate) * up``, elementwise, in place of ``gate``; each element's bits are its own.

    torch's own SiLU rounds the last elements of every thread's share differently on a CPU,
    so a row's bits would depend on its place in the batch; ``exp`` and division do not.
    ``spare`` is overwritten.
    """
    if gate.device.type != "cpu":
        return F.silu(gate, inplace=True).mul_(up)
    return gate.div_(torch.neg(gate, out=spare).exp_().add_(1.0)).mul_(up)
