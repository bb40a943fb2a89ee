"""A row of a matrix product is the same to the last bit whatever rows surround it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bagel_triton.model.cpu.row_stable import add_linear, few_rows_linear, linear, silu_product
from tests.support.exact import assert_same

Product = Callable[..., Tensor]
ROWS = 600
# 100 and 385 are no multiples of a vector; 1408 and 3584 are inner sizes of published models.
SHAPES = [(64, 96), (96, 160), (100, 24), (160, 96), (385, 96), (512, 64), (1408, 256), (3584, 256)]
COUNTS = [1, 2, 3, 5, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65, 127, 130, 256, 301, 514, ROWS]


def _layer(inner: int, outer: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(outer, inner, generator=generator) / inner**0.5, torch.randn(outer, generator=generator)


def _rows(inner: int) -> Tensor:
    return torch.randn(ROWS, inner, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("product", [linear, few_rows_linear])
@pytest.mark.parametrize(("inner", "outer"), SHAPES)
@pytest.mark.parametrize("biased", [True, False], ids=["bias", "no-bias"])
def test_a_row_does_not_depend_on_its_batch(product: Product, inner: int, outer: int, biased: bool) -> None:
    x, (weight, bias) = _rows(inner), _layer(inner, outer)
    full = product(x, weight, bias if biased else None)
    for count in COUNTS:
        for start in {0, 1, 5, ROWS - count} & set(range(ROWS - count + 1)):
            part = product(x[start : start + count], weight, bias if biased else None)
            assert_same(part, full[start : start + count], (count, start))


@pytest.mark.parametrize("threads", [1, 3])
def test_few_rows_do_not_depend_on_the_number_of_threads(threads: int) -> None:
    x, (weight, bias) = _rows(3584), _layer(3584, 256)
    expected = few_rows_linear(x, weight, bias)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_same(few_rows_linear(x, weight, bias), expected, threads)
        assert_same(few_rows_linear(x[7:8], weight, bias), expected[7:8], threads)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("product", [linear, few_rows_linear])
@pytest.mark.parametrize(("inner", "outer"), SHAPES)
def test_it_is_the_matrix_product(product: Product, inner: int, outer: int) -> None:
    x, (weight, bias) = _rows(inner), _layer(inner, outer)
    exact = x.double() @ weight.double().T + bias.double()
    for count in (1, 17, ROWS):
        ours = product(x[:count], weight, bias)
        assert ours.shape == (count, outer)
        assert (ours - exact[:count]).abs().max() / exact.abs().max() < 3e-6
        torch.testing.assert_close(ours, F.linear(x[:count], weight, bias), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("product", [linear, few_rows_linear])
def test_no_rows_are_no_rows(product: Product) -> None:
    weight, bias = _layer(96, 32)
    assert product(torch.empty(0, 96), weight, bias).shape == (0, 32)


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("biased", [True, False], ids=["bias", "no-bias"])
def test_into_a_place_it_is_the_same(rows: int, biased: bool) -> None:
    x, (weight, bias) = _rows(1408)[:rows], _layer(1408, 64)
    room = torch.full((50, 64), 7.0)
    place = room[3 : 3 + rows]
    out = linear(x, weight, bias if biased else None, place)
    assert out.data_ptr() == place.data_ptr()
    assert torch.equal(place, linear(x, weight, bias if biased else None))
    assert bool((room[:3] == 7.0).all() and (room[3 + rows :] == 7.0).all())


@pytest.mark.parametrize(("inner", "outer"), SHAPES)
def test_an_added_product_is_the_sum_and_does_not_depend_on_its_batch(inner: int, outer: int) -> None:
    x, (weight, _) = _rows(inner), _layer(inner, outer)
    before = torch.randn(ROWS, outer, generator=torch.Generator().manual_seed(2))
    full = before.clone()
    add_linear(x, weight, full)
    torch.testing.assert_close(full.double(), before + x.double() @ weight.double().T, rtol=1e-5, atol=1e-5)
    for count in COUNTS:
        for start in {0, 5, ROWS - count} & set(range(ROWS - count + 1)):
            room = before.clone()
            add_linear(x[start : start + count], weight, room[start : start + count])
            assert_same(room[start : start + count], full[start : start + count], (count, start))
            assert torch.equal(room[:start], before[:start])
            assert torch.equal(room[start + count :], before[start + count :])


@pytest.mark.parametrize("inner", [96, 1408])
def test_silu_product_does_not_depend_on_its_batch(inner: int) -> None:
    gate, up = _rows(inner), _rows(inner).flip(0)
    full = silu_product(gate.clone(), up)
    for count in COUNTS:
        for start in {0, 5, ROWS - count} & set(range(ROWS - count + 1)):
            rows = slice(start, start + count)
            assert torch.equal(silu_product(gate[rows].clone(), up[rows]), full[rows]), (count, start)


def test_silu_product_is_the_formula() -> None:
    gate, up = _rows(96)[:40], _rows(96)[40:80]
    expected = F.silu(gate.double()) * up.double()
    out = silu_product(gate.clone(), up)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)
