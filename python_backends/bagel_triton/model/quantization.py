"""Linear layers whose weights are stored in eight or four bits, applied to the plain network from outside.

A *form* says how a weight is stored and whether rows of activations are rounded, too. Weights are symmetric, without
zero points: ``weight = code * weight_scale``, one scale for each output row in eight bits and one for each group of
its inputs in four. The scales of ``int8`` and ``int4`` are torchao's and compressed-tensors' symmetric ones. A GPU's
products are torch's own kernels; no GPU has run them yet.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bagel_triton.model.mot import Transformer

Storage = Literal["int8", "fp8", "int4", "nf4"]
FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
MAX_GROUP = 64  # inputs that share a scale in four bits, at most
# Quantiles of a normal distribution, scaled to [-1, 1] (QLoRA, arXiv 2305.14314, appendix E).
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
INT4 = tuple(float(code) for code in range(-8, 8))
CODEBOOKS: dict[Storage, tuple[float, ...]] = {"int4": INT4, "nf4": NF4}
SCALE = "weight_scale"
NF4_BINS = 32  # of each half of NF4's range
INT8_ROWS = 1024  # that a product of integers takes at once: its sums are four bytes each

# The layers that are quantised: those of both experts in every layer of the transformer, 90 % of all weights.
# All others keep the dtype of the network. docs/quantization.md measures what that costs.
QUANTIZED = ("qkv_proj", "o_proj", "mlp.gate_up_proj", "mlp.down_proj")


@dataclass(frozen=True)
class Form:
    """One form of quantised weights; with ``activations`` each row of a layer's input is rounded alike, as it comes.

    In four bits ``group`` inputs share a scale, or fewer where it does not divide them.
    """

    name: str
    storage: Storage
    activations: bool = False
    group: int = MAX_GROUP

    @property
    def bits(self) -> int:
        """Bits of one weight, without its share of a scale."""
        return 4 if self.storage in CODEBOOKS else 8

    def group_size(self, inner: int) -> int:
        """Inputs that share a scale in four bits: the largest power of two up to ``group`` that divides ``inner``."""
        size = self.group
        while inner % size:
            size //= 2
        return size

    def tensors(self, rows: int, inner: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of the stored tensors of a weight [rows, inner], by name."""
        if self.storage in CODEBOOKS:
            scales = (rows, inner // self.group_size(inner))
            return {"weight": ((rows, inner // 2), torch.uint8), SCALE: (scales, torch.bfloat16)}
        codes = torch.int8 if self.storage == "int8" else FP8
        return {"weight": ((rows, inner), codes), SCALE: ((rows, 1), torch.float32)}

    def encode(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and scales of a float32 weight [rows, inner], as :meth:`tensors` says."""
        if self.storage == "int8":
            return encode_int8(weight)
        if self.storage == "fp8":
            return encode_fp8(weight)
        grouped = weight.unflatten(1, (-1, self.group_size(weight.shape[1])))
        # The scale is rounded first, so that the codes make up for its rounding.
        largest = 7.5 if self.storage == "int4" else 1.0
        scale = _positive(grouped.abs().amax(-1) / largest).bfloat16()
        scaled = (grouped / scale.float().unsqueeze(-1)).flatten(1)
        codes = _nearest_int4(scaled) if self.storage == "int4" else _nearest_nf4(scaled)
        return codes[:, ::2] | codes[:, 1::2] << 4, scale  # the first of two in the low bits

    def decode(self, weight: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [rows, inner] of stored ``weight`` and ``scale``, which are computed in float32 on a CPU."""
        exact = torch.float32 if weight.device.type == "cpu" else dtype
        if self.storage in CODEBOOKS:
            pairs = _pairs(self.storage, exact, weight.device)
            levels = pairs.index_select(0, weight.flatten().int()).view(exact)
            dense = levels.view(*scale.shape, -1).mul_(scale.to(exact).unsqueeze(-1)).flatten(1)
        else:
            dense = self.codes(weight, exact).mul_(scale.to(exact))
        return dense.to(dtype)

    def codes(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """The numbers that 8-bit codes stand for, before they are scaled."""
        if weight.dtype != FP8 or weight.device.type != "cpu":
            return weight.to(dtype, copy=True)
        # torch converts float8 one by one on a CPU. Its bits, moved to where float32 has them, are 2^120 too small.
        bits = weight.view(torch.uint8).to(torch.int32)
        magnitude = bits.bitwise_and(0x7F).bitwise_left_shift_(20)
        sign = bits.bitwise_and_(0x80).bitwise_left_shift_(24)
        return magnitude.bitwise_or_(sign).view(torch.float32).mul_(2.0**120).to(dtype)


FORMS = {
    form.name: form
    for form in (
        Form("int8", "int8"),
        Form("int8_w8a8", "int8", activations=True),
        Form("fp8", "fp8"),
        Form("fp8_w8a8", "fp8", activations=True),
        Form("int4", "int4"),
        Form("nf4", "nf4"),
    )
}


def encode_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Each row of x [rows, inner] in int8, and the rows' scales, float32 [rows, 1]."""
    scale = _positive(x.float().abs().amax(1, keepdim=True) / 127.5)
    # By the reciprocal, as torchao: a division rounds ties otherwise.
    return (x.float() * scale.reciprocal()).round_().clamp_(-128, 127).to(torch.int8), scale


def encode_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Each row of x [rows, inner] in float8 (e4m3), and the rows' scales, float32 [rows, 1]."""
    scale = _positive(x.float().abs().amax(1, keepdim=True) / FP8_MAX)
    return (x.float() / scale).clamp_(-FP8_MAX, FP8_MAX).to(FP8), scale


def _nearest_int4(x: Tensor) -> Tensor:
    return x.round_().add_(8).clamp_(0, 15).to(torch.uint8)


def _nearest_nf4(x: Tensor) -> Tensor:
    """The number of the level that is nearest to each of x [rows, inner], which are from -1 to about 1.

    A search takes 40 ns a weight on a CPU, 15 comparisons 30 ns. So the range is cut into bins with at most one
    boundary of levels in each.
    """
    below, boundary = _nf4_bins(x.device)
    bins = x.mul(NF4_BINS).add_(NF4_BINS).clamp_(0, 2 * NF4_BINS).to(torch.int32).flatten()
    above = x.flatten() > boundary.index_select(0, bins)
    return below.index_select(0, bins).add_(above).view(x.shape)


@cache
def _nf4_bins(device: torch.device) -> tuple[Tensor, Tensor]:
    """For each bin, the level below its boundary, and that boundary; infinity where it has none."""
    levels = torch.tensor(NF4)
    boundaries = (levels[1:] + levels[:-1]) / 2
    starts = torch.arange(-NF4_BINS, NF4_BINS + 1) / NF4_BINS
    below = torch.bucketize(starts, boundaries)  # boundaries below each start
    padded = torch.cat((boundaries, torch.tensor([torch.inf])))[below]
    inside = padded < starts + 1 / NF4_BINS
    return below.to(device, torch.uint8), torch.where(inside, padded, torch.inf).to(device)


def _positive(scale: Tensor) -> Tensor:
    """``scale`` with 1 where all that it is for is zero."""
    return scale.masked_fill(scale == 0, 1.0)


@cache
def _pairs(storage: Storage, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The two numbers that each byte stands for, as one integer of their size: [256]."""
    codebook = torch.tensor(CODEBOOKS[storage], dtype=dtype, device=device)
    byte = torch.arange(256, device=device)
    both = torch.stack((codebook[byte & 15], codebook[byte >> 4]), dim=1)
    return both.view(torch.int64 if dtype == torch.float32 else torch.int32).squeeze(1)


class QuantizedLinear(nn.Module):
    """A linear layer with a weight in ``form``; the bias has the dtype of the network."""

    weight: Tensor
    weight_scale: Tensor

    def __init__(self, in_features: int, out_features: int, bias: bool, form: Form) -> None:
        super().__init__()
        self.in_features, self.out_features, self.form = in_features, out_features, form
        for name, (shape, dtype) in form.tensors(out_features, in_features).items():
            self.register_buffer(name, torch.empty(shape, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    def dense(self, dtype: torch.dtype, rows: slice = slice(None)) -> Tensor:
        """The weight of the output ``rows``, [rows, in_features]."""
        return self.form.decode(self.weight[rows], self.weight_scale[rows], dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x [rows, in_features] -> [rows, out_features]."""
        if not self.form.activations:
            return F.linear(x, self.dense(x.dtype), self.bias)
        if self.form.storage == "int8":
            product = torch.cat([self._int8(rows) for rows in x.split(INT8_ROWS)])
        else:
            product = self._fp8(x)
        return product if self.bias is None else product + self.bias

    def _int8(self, x: Tensor) -> Tensor:
        codes, scale = encode_int8(x)
        rows = len(codes)
        if codes.device.type == "cuda" and rows <= 16:  # cuBLAS takes no fewer
            codes = F.pad(codes, (0, 0, 0, 32 - rows))
        product = torch._int_mm(codes, self.weight.t())[:rows]
        return (product * scale * self.weight_scale.t()).to(x.dtype)

    def _fp8(self, x: Tensor) -> Tensor:
        codes, scale = encode_fp8(x)
        if codes.device.type == "cuda":
            return torch._scaled_mm(
                codes, self.weight.t(), scale_a=scale, scale_b=self.weight_scale.t(), out_dtype=x.dtype
            )
        dense = self.form.codes(self.weight, torch.float32)
        return (F.linear(codes.float(), dense) * scale * self.weight_scale.t()).to(x.dtype)


def quantize(transformer: Transformer, form: Form) -> None:
    """Replace the linear layers of a ``transformer`` without weights by layers in ``form``."""
    for name in quantized_layers(transformer):
        layer = transformer.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        quantized = QuantizedLinear(layer.in_features, layer.out_features, layer.bias is not None, form)
        quantized.bias = layer.bias  # in the network's dtype
        transformer.set_submodule(name, quantized)


def quantized_layers(transformer: Transformer) -> Iterator[str]:
    """The names of the layers that :func:`quantize` replaces."""
    for index in range(len(transformer.layers)):
        for expert in ("gen", "und"):
            for layer in QUANTIZED:
                yield f"layers.{index}.{expert}.{layer}"
