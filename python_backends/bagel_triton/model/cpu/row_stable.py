"""CPU operations that compute each row the same way in any batch.

A matrix product chooses its kernel, and with it the order of its sums, by the number of rows:
few rows, or a long inner dimension, round differently. Two rules make every row bit-identical
on a CPU with AVX-512, for 2 % of a product's time at most: never fewer than ``MIN_ROWS`` rows,
never more than ``MAX_INNER`` of the inner dimension at once.

Sixteen rows cost twice one row's time, which is that of reading the weights. So the rows of texts
being decoded take another product where Numba is installed, :func:`few_rows_linear`. Hundreds of
rows are faster in torch's, and the two round differently. Which one a row takes follows from the
row alone, never from the batch. ``tests/unit/test_row_stable.py`` holds both to these rules.

A quantised weight is decoded a few output rows at a time, which stay in the core's cache until they are used: no
dense copy of a layer is ever in memory.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bagel_triton.model.mot import RMSNorm
from bagel_triton.model.quantization import QuantizedLinear, encode_fp8, encode_int8

log = logging.getLogger(__name__)
MIN_ROWS = 16
ONEDNN_ROWS = 256, 64, 16  # of a product
MAX_INNER = 512
VECTOR = 16  # float32 numbers in the widest registers
TWO_VECTORS = 64  # an elementwise operation takes two vectors at a time, of 32 bfloat16 numbers each at most
ONE_SHARE = 1 << 15  # an elementwise operation splits more numbers than these among its threads
CACHED = 1 << 17  # so many numbers of each operand stay in a core's cache between two operations
WEIGHTS = 1 << 19  # of a quantised layer that are decoded at once


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``, into ``out`` if given; x [rows, in], weight [out, in] -> [rows, out]."""
    if takes_onednn(x.dtype):
        return _onednn_linear(x, weight, bias, out)
    rows = len(x)
    if rows < MIN_ROWS:
        padded = linear(_padded(x), weight, bias)[:rows]
        return padded if out is None else out.copy_(padded)
    first, *rest = _pieces(x.shape[1])
    out = _product(x[:, first], weight[:, first], bias, out)
    for piece in rest:
        out.addmm_(x[:, piece], weight[:, piece].t())
    return out


def add_linear(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """Add ``x @ weight.T`` to ``out`` [rows, out]; x [rows, in], weight [out, in]."""
    if takes_onednn(x.dtype):
        _onednn_linear(x, weight, None, out, add=True)
        return
    rows = len(x)
    if rows < MIN_ROWS:
        padded = _padded(out)
        add_linear(_padded(x), weight, padded)
        out.copy_(padded[:rows])
        return
    for piece in _pieces(x.shape[1]):
        out.addmm_(x[:, piece], weight[:, piece].t())


@cache
def few_rows_kernels(dtype: torch.dtype) -> ModuleType | None:
    """:mod:`bagel_triton.model.cpu.kernels` where that is installed and of use; compiled by the first call."""
    if dtype != torch.float32:
        return None
    try:
        from bagel_triton.model.cpu import kernels
    except ImportError as error:  # without the extra `cpu`
        log.info("torch computes what compiled kernels of the extra cpu would compute faster: %s", error)
        return None
    except Exception:  # Numba and LLVM raise errors of many types where they cannot compile
        log.exception("torch computes what compiled kernels would compute faster: Numba could not compile these")
        return None
    return kernels


def kernels_summary(dtype: torch.dtype) -> str:
    """The kernels that a CPU computes with in ``dtype``, and why; imports none of them."""
    if dtype != torch.float32:
        return "torch's: compiled ones are for float32"
    if find_spec("numba") is None:
        return "torch's: numba is not installed (pip install 'bagel-triton[cpu]')"
    if takes_onednn(dtype):
        return "compiled by Numba: texts, and images with their attention between products of oneDNN"
    return "compiled by Numba: texts"


def few_rows_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """:func:`linear` for rows of which there are usually few: other roundings, as many rows or one alone."""
    kernels = few_rows_kernels(x.dtype)
    if kernels is None:
        return linear(x, weight, bias)
    out = x.new_empty(len(x), len(weight))
    kernels.product(x, weight, bias, out)
    return out


def add_few_rows_linear(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """:func:`add_linear` likewise."""
    kernels = few_rows_kernels(x.dtype)
    if kernels is None:
        add_linear(x, weight, out)
    else:
        kernels.product(x, weight, out, out)


@cache
def _is_amd() -> bool:
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def takes_onednn(dtype: torch.dtype) -> bool:
    """Whether products in ``dtype`` are oneDNN's, in pieces of a few sizes.

    On an AMD processor they are the faster ones in float32: MKL's use half a vector. In bfloat16 torch's own are
    oneDNN's where the processor has instructions for it.
    """
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return torch.cpu._is_avx512_bf16_supported()
    return dtype == torch.float32 and _is_amd()


def compiles_all(dtype: torch.dtype) -> bool:
    """Whether many rows, too, take the compiled kernels between their products.

    Beside MKL's products, which write to any place, they are unmeasured.
    """
    return few_rows_kernels(dtype) is not None and takes_onednn(dtype)


def onednn_pieces(rows: int, sizes: tuple[int, ...] = ONEDNN_ROWS) -> Iterator[tuple[int, int]]:
    """First row and size of the pieces that oneDNN's products of ``rows`` are cut into; the last may be larger.

    The library keeps code for every number of rows that it meets, half a megabyte for each shape of a weight. So
    there are a few ``sizes``. A row is the same in a piece of any size.
    """
    start = 0
    while start < rows:
        size = next((size for size in sizes if size <= rows - start), sizes[-1])
        yield start, size
        start += size


def onednn_product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias`` by oneDNN, of the rows of one of its pieces."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product


def _onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None, add: bool = False) -> Tensor:
    """oneDNN's product in ``out``, or added to it; into memory of its own where ``out`` is None."""
    pieces = [*onednn_pieces(len(x))]
    if out is None and len(pieces) != 1:
        out = x.new_empty(len(x), len(weight))
    for start, size in pieces:
        part = x[start : start + size]
        rows = len(part)
        if rows < size:
            part = F.pad(part, (0, 0, 0, size - rows))
        product = onednn_product(part, weight, bias)[:rows]
        if out is None:
            return product
        place = out[start : start + rows]
        _ = place.add_(product) if add else place.copy_(product)
        del part, product  # before the next are computed
    assert out is not None, "one piece was returned"
    return out


def _padded(x: Tensor) -> Tensor:
    return F.pad(x, (0, 0, 0, MIN_ROWS - len(x)))


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
    if bias is None:
        return torch.mm(x, weight.t(), out=out)
    return torch.addmm(bias, x, weight.t(), out=out)


def _pieces(inner: int) -> list[slice]:
    """The inner dimension in pieces of about one size and whole vectors."""
    count = -(-inner // MAX_INNER)
    step = inner if count == 1 else -(-inner // (count * VECTOR)) * VECTOR
    return [slice(start, min(start + step, inner)) for start in range(0, inner, step)]


def silu_product(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up`` in place of ``gate``; [rows, inner] both.

    torch's SiLU rounds the numbers that do not fill a vector differently, at the end of every
    thread's share. Parts of whole vectors that one thread computes have no such end. Rows of
    other widths take ``exp`` and a division, which round all numbers alike.
    """
    inner = gate.shape[1]
    rows = max((CACHED if torch.get_num_threads() == 1 else ONE_SHARE) // inner, 1)
    whole_vectors = inner % TWO_VECTORS == 0 and inner <= ONE_SHARE
    for part, factor in zip(gate.split(rows), up.split(rows), strict=True):
        if whole_vectors:
            F.silu(part, inplace=True).mul_(factor)
        else:
            part.div_(torch.neg(part).exp_().add_(1.0)).mul_(factor)
    return gate


def rms_norm(x: Tensor, norm: RMSNorm, out: Tensor | None = None) -> Tensor:
    """``norm`` of x [..., size], into ``out`` if given, which may be ``x``.

    Three passes over the rows; torch's own takes six on a CPU.
    """
    return torch.mul(x, rms_scale(x, norm.eps), out=torch.empty_like(x) if out is None else out).mul_(norm.weight)


def rms_scale(x: Tensor, eps: float) -> Tensor:
    """The factor of each row's norm before its weights: x [..., size] -> [..., 1] float32."""
    length: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    return (length.square_() / x.shape[-1]).add_(eps).rsqrt_()


def rotate(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
    """:func:`bagel_triton.model.mot.rotate` of ``x`` into ``out``, [tokens, heads, head_dim] both."""
    torch.mul(x, cos, out=out)
    (first, second), halves, sines = (part.chunk(2, dim=-1) for part in (x, out, sin))
    for half, other, sine in zip(halves, (second, first), sines, strict=True):
        half.addcmul_(other, sine)


class RowStableLinear(nn.Linear):
    """A linear layer by :func:`linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """x [rows, in] -> [rows, out]."""
        return linear(x, self.weight, self.bias)


class FewRowsLinear(nn.Linear):
    """A linear layer by :func:`few_rows_linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """x [rows, in] -> [rows, out]."""
        return few_rows_linear(x, self.weight, self.bias)


class RowStableNorm(RMSNorm):
    """A norm by :func:`rms_norm`."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., size], same shape out."""
        return rms_norm(x, self)


def make_row_stable(model: nn.Module, *names: str, few_rows: Collection[str] = ()) -> None:
    """Replace the linear layers and norms at and below the submodules ``names`` of a ``model`` without weights.

    Layers named in ``few_rows`` become a :class:`FewRowsLinear`, others a :class:`RowStableLinear`.
    """
    for top in names:
        for name, module in list(model.get_submodule(top).named_modules(prefix=top)):
            if isinstance(module, nn.Linear):
                kind = FewRowsLinear if name in few_rows else RowStableLinear
                biased = module.bias is not None
                model.set_submodule(name, kind(module.in_features, module.out_features, biased))
            elif isinstance(module, RMSNorm):
                model.set_submodule(name, RowStableNorm(len(module.weight), module.eps))


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
        del product  # before the next is computed
    return out


def add_projection(x: Tensor, layer: nn.Linear | QuantizedLinear, out: Tensor, few: bool = False) -> None:
    """Add a linear ``layer`` without a bias of x [tokens, in] to ``out`` [tokens, out]; ``few`` as above."""
    if not isinstance(layer, QuantizedLinear):
        if few:
            add_few_rows_linear(x, layer.weight, out)
        else:
            add_linear(x, layer.weight, out)
        return
    for part, product in _products(x, layer, 0, layer.out_features):
        out[:, part].add_(product)
        del product  # likewise


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
        if form.storage == "int8":  # sums of integers are exact in any order
            product = torch._int_mm(codes, weight.t()).float()
        else:
            product = linear(codes, form.codes(weight, torch.float32))
        yield place, product.mul_(scale).mul_(layer.weight_scale[rows].t()).to(x.dtype)
