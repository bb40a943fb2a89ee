"""Equality to the last bit, on machines that support it."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@cache
def rows_are_stable() -> bool:
    """Whether this machine's own matrix products, of 16 rows and more, give a row the same bits in any batch.

    With AVX-512 they do. With AVX2 alone the last few rows of most batches are rounded otherwise.
    """
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(64, 64, generator=generator), torch.randn(96, 64, generator=generator)
    whole = x @ weight.T
    return all(torch.equal(x[:rows] @ weight.T, whole[:rows]) for rows in range(16, 64))


def assert_same(one: Tensor, other: Tensor, what: object = None) -> None:
    """Equal to the last bit where rows are stable, elsewhere as near as float32 is promised to be."""
    if rows_are_stable():
        assert torch.equal(one, other), what
    elif one.dtype == torch.uint8:
        torch.testing.assert_close(one.int(), other.int(), rtol=0, atol=1)
    else:
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def same_image(one: NDArray[Any], other: NDArray[Any]) -> bool:
    """Whether images are equal where rows are stable, elsewhere but for the rounding of a uint8."""
    if rows_are_stable():
        return np.array_equal(one, other)
    return one.shape == other.shape and int(np.abs(one.astype(int) - other.astype(int)).max()) <= 1
