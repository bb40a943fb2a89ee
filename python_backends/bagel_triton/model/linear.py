"""Matrix products whose rows do not depend on the other rows of the batch.

A CPU matrix product chooses its kernel, and with it the order of its sums, by the
number of rows: few rows, or a long inner dimension, round differently. Two rules,
measured to cost nothing, make every row bit-identical whatever it is packed with:
never fewer than ``MIN_ROWS`` rows, never more than ``MAX_INNER`` of the inner
dimension at once. ``tests/unit/test_linear.py`` holds the machine it runs on to it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MIN_ROWS = 16
MAX_INNER = 384


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``; x [rows, in], weight [out, in] -> [rows, out]."""
    if x.device.type != "cpu":
        return F.linear(x, weight, bias)
    rows, inner = x.shape
    if rows < MIN_ROWS:
        return linear(F.pad(x, (0, 0, 0, MIN_ROWS - rows)), weight, bias)[:rows]
    out = F.linear(x[:, :MAX_INNER], weight[:, :MAX_INNER], bias)
    for start in range(MAX_INNER, inner, MAX_INNER):
        stop = start + MAX_INNER
        out.addmm_(x[:, start:stop], weight[:, start:stop].t())
    return out


def silu_product(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up``, elementwise, in place of ``gate``; each element's bits are its own.

    torch's own SiLU rounds the last elements of every thread's share differently on a CPU,
    so a row's bits would depend on its place in the batch; ``exp`` and division do not.
    """
    if gate.device.type != "cpu":
        return F.silu(gate, inplace=True).mul_(up)
    return gate.div_(gate.neg().exp_().add_(1.0)).mul_(up)


def expert_linear(und: nn.Linear, gen: nn.Linear, x: Tensor, gen_rows: int) -> Tensor:
    """Each row through its expert: the first ``gen_rows`` through ``gen``, the rest through ``und``.

    x [tokens, in] -> [tokens, out].
    """
    rows = x.shape[0]
    if gen_rows == 0:
        return linear(x, und.weight, und.bias)
    if gen_rows == rows:
        return linear(x, gen.weight, gen.bias)
    return torch.cat((linear(x[:gen_rows], gen.weight, gen.bias), linear(x[gen_rows:], und.weight, und.bias)))
