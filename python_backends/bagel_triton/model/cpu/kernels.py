"""Kernels that Numba compiles for this CPU; an extra (``bagel-triton[cpu]``) that ``row_stable`` does without.

A product of few rows takes the time of reading its weights. The libraries behind torch read them at a fraction of the
memory's rate, and from two rows on in other ways for other numbers of rows. Here any row is multiplied by the same
instructions, whichever rows are beside it, so its bits do not depend on them.

Norms, rotations, the activation and a softmax pass once over numbers that torch passes over three to six times. They
are for many rows, too, beside products of oneDNN: see :func:`~bagel_triton.model.cpu.row_stable.compiles_all`.

The threads are torch's own OpenMP threads of the caller: a second set would compete with them for the cores.

What the compiled functions call is inlined. Called, it would be one compiled copy in the process that compiles, another
in those that load the result, and their sums would round differently.

Raises:
    ImportError: Numba is missing, or torch has another OpenMP than GNU's.
"""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import carray, cfunc, njit, types
from numba.extending import intrinsic
from torch import Tensor

# Sums may be split over a vector's lanes. The split is the compiled code's: the same for every row and number of rows.
SUMS = {"reassoc", "contract", "nsz"}
INNER = np.uint64(1024)  # numbers of four weight rows, which all rows read while they are in the first cache
GROUP = np.uint64(4)  # rows of the weight at a time
MIN_THREAD_NUMBERS = 1 << 17  # which one thread reads in some 20 us
LOG2E = np.float32(math.log2(math.e))
ZERO, HALF, ONE = np.float32(0), np.float32(0.5), np.float32(1)
LOWEST = np.float32(-3e38)  # above the -inf of no key yet, from which nothing can be subtracted
LEAST = np.float32(-126)  # the exponent of the smallest normal number
INFINITE = np.float32(128)  # and of none
# ln(2) ** n / n!, the series of 2 ** x: to 2e-8 of the result between -0.5 and 0.5.
E1, E2, E3, E4, E5, E6 = (np.float32(math.log(2) ** n / math.factorial(n)) for n in range(1, 7))
# Compiled code is kept beside this file. Where that cannot be written to, each process compiles for a second or two.
_folder = Path(__file__).parent / "__pycache__"
CACHE = "NUMBA_CACHE_DIR" in os.environ or os.access(_folder if _folder.exists() else _folder.parent, os.W_OK)

try:
    _gomp_parallel = ctypes.CDLL(None).GOMP_parallel  # runs a function in each of so many threads
except AttributeError:
    raise ImportError("torch has no GNU OpenMP here") from None
_gomp_parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
_gomp_parallel.restype = None
_thread_number = types.ExternalFunction("omp_get_thread_num", types.int32())
_team_size = types.ExternalFunction("omp_get_num_threads", types.int32())  # maybe fewer than were asked for


@njit(fastmath=SUMS, forceinline=True)
def _multiply(x, weight, at, first, second, third, fourth, count):  # pragma: no cover - compiled
    """``count`` numbers of ``x`` from ``at`` on by as many from four places of the flat ``weight``: four sums."""
    a = b = c = d = ZERO
    for k in range(count):
        value = x[at + k]
        a += weight[first + k] * value
        b += weight[second + k] * value
        c += weight[third + k] * value
        d += weight[fourth + k] * value
    return a, b, c, d


@cfunc(types.void(types.CPointer(types.voidptr)), cache=CACHE)
def _add_share(arguments):  # pragma: no cover - compiled
    """One thread's share of :func:`product`: groups of the weight's rows.

    Places in flat arrays are unsigned, or each would be checked for counting from the end, without vectors.
    """
    rows, inner, width, stride, base_stride = carray(arguments[4], 5, np.uint64)
    threads = np.uint64(_team_size())
    x = carray(arguments[0], (rows * inner,), np.float32)
    weight = carray(arguments[1], (width * inner,), np.float32)
    out = carray(arguments[2], (rows * stride,), np.float32)
    base = carray(arguments[3], (rows * stride,), np.float32)
    one = np.uint64(1)
    share = (width + GROUP * threads - one) // (GROUP * threads) * GROUP
    pieces = (inner + INNER - one) // INNER
    step = (inner + pieces - one) // pieces
    start = share * np.uint64(_thread_number())
    for row in range(start, min(start + share, width), GROUP):
        last = width - one
        second, third, fourth = min(row + one, last), min(row + one + one, last), min(row + GROUP - one, last)
        for at in range(np.uint64(0), inner, step):
            count = min(step, inner - at)
            places = row * inner + at, second * inner + at, third * inner + at, fourth * inner + at
            for number in range(rows):
                a, b, c, d = _multiply(x, weight, number * inner + at, *places, count)
                place = number * stride + row
                source, summand = (out, place) if at else (base, number * base_stride + row)
                out[place] = source[summand] + a
                if second > row:
                    out[place + one] = source[summand + one] + b
                if third > second:
                    out[place + one + one] = source[summand + one + one] + c
                if fourth > third:
                    out[place + GROUP - one] = source[summand + GROUP - one] + d


def _run(function: Any, threads: int, sizes: Sequence[int], tensors: tuple[Tensor, ...], eps: float = 0.0) -> None:
    """Run a compiled ``function`` in ``threads`` threads, on the addresses of ``tensors``, ``sizes`` and ``eps``."""
    pointers = []
    for x in tensors:
        assert x.dtype is torch.float32, "the kernels read raw memory"
        pointers.append(x.data_ptr())
    numbers, epsilon = (ctypes.c_uint64 * len(sizes))(*sizes), ctypes.c_float(eps)
    pointers += [ctypes.addressof(numbers), ctypes.addressof(epsilon)]
    _gomp_parallel(function.address, (ctypes.c_void_p * len(pointers))(*pointers), threads, 0)


def _run_on_rows(function: Any, sizes: Sequence[int], tensors: tuple[Tensor, ...], eps: float = 0.0) -> None:
    """The same for contiguous ``tensors``: threads share the rows, of which ``sizes`` begins with the number."""
    for x in tensors:
        assert x.is_contiguous(), "likewise"
    _run(function, _threads(tensors[0].numel()), sizes, tensors, eps)


def _threads(numbers: int) -> int:
    """One thread or all, for so many ``numbers`` to read: OpenMP ends the threads that a smaller team leaves out."""
    return torch.get_num_threads() if numbers >= 2 * MIN_THREAD_NUMBERS else 1


@njit(forceinline=True)
def _own_part(count):  # pragma: no cover - compiled
    """First and stop of this thread's part of ``count`` rows or heads."""
    share = (np.int64(count) + _team_size() - 1) // _team_size()
    start = min(share * _thread_number(), np.int64(count))
    return start, min(start + share, np.int64(count))


def product(x: Tensor, weight: Tensor, base: Tensor | None, out: Tensor) -> None:
    """``base + x @ weight.T`` in ``out``, with as many threads as torch has here where that is worth it.

    x [rows, in], weight [out, in], base [out], or [rows, out] and then maybe ``out`` itself, or none, out [rows, out]:
    float32 on a CPU, with adjacent numbers in each row.
    """
    assert weight.is_contiguous(), "the kernel reads raw memory"
    x, (width, inner) = x.contiguous(), weight.shape
    if base is None:
        base = out.zero_()
    sizes = len(x), inner, width, out.stride(0), base.stride(0) if base.ndim == 2 else 0
    _run(_add_share, _threads(width * inner), sizes, (x, weight, out, base))


@njit(fastmath=SUMS, error_model="numpy", forceinline=True)
def _norm_rows(x, weight, eps, out):  # pragma: no cover - compiled
    for row in range(len(x)):
        total = ZERO
        for k in range(x.shape[1]):
            total += x[row, k] * x[row, k]
        scale = np.float32(1) / np.sqrt(total / np.float32(x.shape[1]) + eps)
        for k in range(x.shape[1]):
            out[row, k] = x[row, k] * scale * weight[k]


@cfunc(types.void(types.CPointer(types.voidptr)), cache=CACHE)
def _norm_share(arguments):  # pragma: no cover - compiled
    """One thread's share of :func:`rms_norm`: some of the rows; so are the other shares below."""
    rows, size = carray(arguments[3], 2, np.int64)
    x = carray(arguments[0], (rows, size), np.float32)
    weight = carray(arguments[1], (size,), np.float32)
    out = carray(arguments[2], (rows, size), np.float32)
    start, stop = _own_part(rows)
    _norm_rows(x[start:stop], weight, carray(arguments[4], 1, np.float32)[0], out[start:stop])


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The root-mean-square norm of x [rows, size], contiguous float32, same shape out."""
    out = torch.empty_like(x)
    _run_on_rows(_norm_share, x.shape, (x, weight, out), eps)
    return out


@njit(fastmath=SUMS, error_model="numpy", forceinline=True)
def _norm_and_rotate(products, first, weight, eps, cos, sin, out):  # pragma: no cover - compiled
    rows, heads, size = out.shape
    half = size // 2
    # The norm's weights times the tables, for all heads of a row.
    low_cos, low_sin, high_cos, high_sin = np.empty((4, half), np.float32)
    for row in range(rows):
        for k in range(half):
            low_cos[k], low_sin[k] = weight[k] * cos[row, k], weight[half + k] * sin[row, k]
            high_cos[k], high_sin[k] = weight[half + k] * cos[row, half + k], weight[k] * sin[row, half + k]
        for head in range(heads):
            start = first + head * size
            # Slices, as an index that is not a loop's own is checked for counting from the end, without vectors.
            low, high = products[row, start : start + half], products[row, start + half : start + size]
            total = ZERO
            for k in range(half):
                total += low[k] * low[k] + high[k] * high[k]
            scale = np.float32(1) / np.sqrt(total / np.float32(size) + eps)
            low_out, high_out = out[row, head, :half], out[row, head, half:]
            for k in range(half):
                low_out[k] = scale * (low[k] * low_cos[k] + high[k] * low_sin[k])
            for k in range(half):
                high_out[k] = scale * (high[k] * high_cos[k] + low[k] * high_sin[k])


@cfunc(types.void(types.CPointer(types.voidptr)), cache=CACHE)
def _rotate_share(arguments):  # pragma: no cover - compiled
    rows, columns, first, heads, size = carray(arguments[5], 5, np.int64)
    products = carray(arguments[0], (rows, columns), np.float32)
    weight = carray(arguments[1], (size,), np.float32)
    cos = carray(arguments[2], (rows, size), np.float32)
    sin = carray(arguments[3], (rows, size), np.float32)
    out = carray(arguments[4], (rows, heads, size), np.float32)
    eps = carray(arguments[6], 1, np.float32)[0]
    start, stop = _own_part(rows)
    _norm_and_rotate(products[start:stop], first, weight, eps, cos[start:stop], sin[start:stop], out[start:stop])


def norm_and_rotate(
    products: Tensor, first: int, weight: Tensor, eps: float, cos: Tensor, sin: Tensor, out: Tensor
) -> None:
    """Norm and rotary embedding of the heads in ``products`` from the column ``first`` on.

    products [rows, columns], weight [head_dim], cos and sin [rows, 1, head_dim] as of
    :func:`bagel_triton.model.mot.rotary_tables`, out [rows, heads, head_dim]: contiguous float32 all.
    """
    rows, heads, size = out.shape
    sizes = rows, products.shape[1], first, heads, size
    _run_on_rows(_rotate_share, sizes, (products, weight, cos, sin, out), eps)


@intrinsic
def _from_bits(_context, bits):  # pragma: no cover - compiled
    """The float32 whose bits are the int32's."""

    def generate(context, builder, _signature, arguments):
        return builder.bitcast(arguments[0], context.get_value_type(types.float32))

    return types.float32(types.int32), generate


@njit(fastmath=SUMS, forceinline=True)
def _power(whole, part):  # pragma: no cover - compiled
    """``2 ** (whole + part)``: whole from -126 to 128, where it is infinite, part from -0.5 to 0.5."""
    series = ONE + part * (E1 + part * (E2 + part * (E3 + part * (E4 + part * (E5 + part * E6)))))
    return series * _from_bits((whole + np.int32(127)) << np.int32(23))


@njit(fastmath=SUMS, forceinline=True)
def _negative_power(x):  # pragma: no cover - compiled
    """``2 ** x`` of an x of at most 0; at least the smallest normal number."""
    x = LEAST if x < LEAST else x
    whole = np.int32(x - HALF)
    return _power(whole, x - np.float32(whole))


@njit(fastmath=SUMS, error_model="numpy", forceinline=True)
def _attend_heads(query, key, value, out, start, stop):  # pragma: no cover - compiled
    size, length = query.shape[1], len(key)
    group = len(query) // key.shape[1]
    factor = LOG2E / np.sqrt(np.float32(size))
    weights = np.empty((stop - start, length), np.float32)
    for token in range(length):
        for head in range(start, stop):
            kv_head, score = head // group, ZERO
            for k in range(size):
                score += query[head, k] * key[token, kv_head, k]
            weights[head - start, token] = score * factor
    for head in range(start, stop):
        row = weights[head - start]
        largest, total = row.max(), ZERO
        for token in range(length):
            row[token] = _negative_power(row[token] - largest)
            total += row[token]
        for k in range(size):
            out[head, k] = ZERO
        for token in range(length):
            weight = row[token] / total
            for k in range(size):
                out[head, k] += weight * value[token, head // group, k]


@cfunc(types.void(types.CPointer(types.voidptr)), cache=CACHE)
def _attend_share(arguments):  # pragma: no cover - compiled
    """One thread's share of :func:`attend_row`: some of the heads."""
    heads, kv_heads, size, length = carray(arguments[4], 4, np.int64)
    query = carray(arguments[0], (heads, size), np.float32)
    key = carray(arguments[1], (length, kv_heads, size), np.float32)
    value = carray(arguments[2], (length, kv_heads, size), np.float32)
    out = carray(arguments[3], (heads, size), np.float32)
    start, stop = _own_part(heads)
    if start < stop:
        _attend_heads(query, key, value, out, start, stop)


def attend_row(query: Tensor, key: Tensor, value: Tensor, out: Tensor) -> None:
    """Attention of one token to all, in ``out``, with as many threads as torch has here where that is worth it.

    query and out [1, heads, head_dim], key and value [length, kv_heads, head_dim], float32 on a CPU; query and out are
    contiguous. A head is the same on any thread.
    """
    key, value, (length, kv_heads, size) = key.contiguous(), value.contiguous(), key.shape
    heads = query.shape[1]
    threads = _threads(heads * length * size)
    _run(_attend_share, threads, (heads, kv_heads, size, length), (query, key, value, out))


@intrinsic
def _larger(_context, x, y):  # pragma: no cover - compiled
    """The larger of two float32, neither NaN. LLVM finds the largest of many by vectors, unlike with ``max``."""

    def generate(context, builder, _signature, arguments):
        kind = context.get_value_type(types.float32)
        larger = builder.module.declare_intrinsic("llvm.maxnum", [kind], ir.FunctionType(kind, [kind, kind]))
        return builder.call(larger, arguments, fastmath=("nnan", "nsz"))

    return types.float32(types.float32, types.float32), generate


@njit(fastmath=SUMS, error_model="numpy", forceinline=True)
def _softmax_rows(scores, keys, largest, total, shrink):  # pragma: no cover - compiled
    for row in range(len(scores)):
        line, top = scores[row], max(largest[row], LOWEST)
        for k in range(keys):
            top = _larger(top, line[k])
        shrink[row] = _negative_power(largest[row] - top)
        largest[row] = top
        found = ZERO
        for k in range(keys):
            power = _negative_power(line[k] - top)
            line[k] = power
            found += power
        line[keys:] = ZERO
        total[row] = total[row] * shrink[row] + found


@cfunc(types.void(types.CPointer(types.voidptr)), cache=CACHE)
def _softmax_share(arguments):  # pragma: no cover - compiled
    rows, width, keys = carray(arguments[4], 3, np.int64)
    scores = carray(arguments[0], (rows, width), np.float32)
    largest = carray(arguments[1], (rows,), np.float32)
    total = carray(arguments[2], (rows,), np.float32)
    shrink = carray(arguments[3], (rows,), np.float32)
    start, stop = _own_part(rows)
    _softmax_rows(scores[start:stop], keys, largest[start:stop], total[start:stop], shrink[start:stop])


def softmax_block(scores: Tensor, keys: int, largest: Tensor, total: Tensor, shrink: Tensor) -> None:
    """One block of a softmax to the base 2 whose keys come in blocks: ``2 ** (scores - largest)``, in place.

    scores [rows, width], of which the columns from ``keys`` on are padding and become 0. largest and total [rows] are
    the maximum and sum of earlier blocks, and become those of all; what earlier blocks gave is to be multiplied by
    shrink [rows]. float32 and contiguous all. It takes a fifth of the time of torch's softmax.
    """
    _run_on_rows(_softmax_share, (*scores.shape, keys), (scores, largest, total, shrink))


@njit(fastmath={"contract"}, error_model="numpy", forceinline=True)  # in this order: gate by up may be infinite
def _silu_rows(products, out):  # pragma: no cover - compiled
    rows, size = out.shape
    for row in range(rows):
        gate, up, place = products[row, :size], products[row, size:], out[row]
        for k in range(size):
            x = min(max(gate[k] * -LOG2E, LEAST), INFINITE)
            whole = np.int32(np.floor(x + HALF))
            place[k] = gate[k] / (ONE + _power(whole, x - np.float32(whole))) * up[k]


@cfunc(types.void(types.CPointer(types.voidptr)), cache=CACHE)
def _silu_share(arguments):  # pragma: no cover - compiled
    rows, size = carray(arguments[2], 2, np.int64)
    products = carray(arguments[0], (rows, 2 * size), np.float32)
    out = carray(arguments[1], (rows, size), np.float32)
    start, stop = _own_part(rows)
    _silu_rows(products[start:stop], out[start:stop])


def silu_product(products: Tensor) -> Tensor:
    """``silu(gate) * up`` of products [rows, gate then up], contiguous float32 -> [rows, half of that]."""
    out = products.new_empty(len(products), products.shape[1] // 2)
    _run_on_rows(_silu_share, out.shape, (products, out))
    return out
