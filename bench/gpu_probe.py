"""The first minute on a GPU: its facts, the attention's kernels, the model's products, and what a launch costs.

Prints a JSON line for each fact; a section that fails says so, and the next one runs. ``--cpu`` runs everything
tiny, to see that it runs. ``python -m bench.gpu_probe [--cpu]``.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bagel_triton.model.attention import attend, attention_kernel
from bagel_triton.model.cuda.attention import KeySpan, call_of, grouped, numbers_of, varlen_attention
from bench.arithmetic import synchronize

CPU = "--cpu" in sys.argv
DEVICE = torch.device("cpu" if CPU else "cuda:0")
DTYPE = torch.float32 if CPU else torch.bfloat16
SMALLER = 64 if CPU else 1
TRIALS = 2 if CPU else 10
HEADS, KV_HEADS, HEAD_DIM, HIDDEN, INNER = 28, 4, 128, 3584, 18944


def say(section: str, **facts: Any) -> None:
    """Print one fact."""
    print(json.dumps({"section": section, **facts}), flush=True)


def seconds(run: Callable[[], Any], trials: int = TRIALS) -> tuple[float, float]:
    """Of the first call, which may plan or compile, and the median of later ones."""
    times = []
    for _ in range(trials + 1):
        synchronize(DEVICE)
        started = time.perf_counter()
        run()
        synchronize(DEVICE)
        times.append(time.perf_counter() - started)
    return times[0], sorted(times[1:])[trials // 2]


def facts() -> None:
    """Versions, and what is installed beside torch."""
    say("facts", torch=torch.__version__, cuda=torch.version.cuda, kernel=attention_kernel(DEVICE, DTYPE))
    for name in ("flashinfer", "flash_attn", "torchao", "cuda.bindings"):
        try:
            say("module", name=name, version=getattr(import_module(name), "__version__", "?"))
        except ImportError as error:
            say("module", name=name, missing=str(error)[:80])
    if not CPU:
        device = torch.cuda.get_device_properties(0)
        say("device", name=device.name, sms=device.multi_processor_count, free=torch.cuda.mem_get_info()[0])


def attention() -> None:
    """One call for all sequences against one at a time in float32: time, and distance.

    The keys of later spans come first, and two spans see the same keys.
    """
    shapes = {"decode": [(1, 900)] * 32, "512": [(1024, 1041)] * 2, "1024": [(4096, 4113)] * 2, "edit": [(4096, 13105)]}
    for name, sizes in shapes.items():
        spans, key_stop, row = [], sum(max(keys // SMALLER, 4) for _, keys in sizes), 0
        keys_of_all = key_stop
        for rows, keys in sizes:
            rows, keys = max(rows // SMALLER, 1), max(keys // SMALLER, 4)
            key_stop -= keys
            spans.append(KeySpan(row, row + rows, key_stop, keys, causal=False))
            row += rows
        spans += [KeySpan(row, row + 2, spans[0].first_key, spans[0].length, causal=False)]
        query = torch.randn(row + 2, HEADS, HEAD_DIM, device=DEVICE, dtype=DTYPE)
        key, value = (torch.randn(keys_of_all, KV_HEADS, HEAD_DIM, device=DEVICE, dtype=DTYPE) for _ in range(2))
        (group,) = grouped(spans)
        call = call_of(group, torch.tensor(numbers_of(group), dtype=torch.int32, device=DEVICE))
        first, later = seconds(lambda: varlen_attention(query, key, value, call))  # noqa: B023
        flops = sum(4 * HEADS * HEAD_DIM * (span.stop - span.start) * span.length for span in spans)
        out, worst = varlen_attention(query, key, value, call), 0.0
        for span in (spans[0], spans[-1]):
            seen = slice(span.first_key, span.first_key + span.length)
            right = attend(query[span.start : span.stop].float(), key[seen].float(), value[seen].float(), False)
            worst = max(worst, float((out[span.start : span.stop].float() - right).norm() / right.norm()))
        rate = round(flops / later / 1e12, 1)
        say("attention", shape=name, first_ms=1e3 * first, ms=1e3 * later, tflops=rate, distance=worst)


def products() -> None:
    """The model's own products: TFLOP/s of many rows, GB/s of few."""
    for rows in (8192, 2048, 32, 8, 1):
        for inner, outer in ((HIDDEN, 4608), (HIDDEN, HIDDEN), (HIDDEN, 2 * INNER), (INNER, HIDDEN)):
            count, width, height = (max(size // SMALLER, 1) for size in (rows, inner, outer))
            x, weight = (torch.randn(size, width, device=DEVICE, dtype=DTYPE) for size in (count, height))
            out = torch.empty(count, height, device=DEVICE, dtype=DTYPE)
            _, later = seconds(lambda: torch.mm(x, weight.t(), out=out))  # noqa: B023
            rate, bandwidth = 2 * count * width * height / later / 1e12, weight.nbytes / later / 1e9
            say("products", rows=count, inner=width, outer=height, tflops=round(rate, 1), gbs=round(bandwidth))


def small() -> None:
    """The operations between the products of a guided step at 1024x1024, and a launch."""
    rows = 8192 // SMALLER
    x = torch.randn(rows, 36 * HEAD_DIM, device=DEVICE, dtype=DTYPE)
    inner = torch.randn(rows, 2 * INNER // SMALLER, device=DEVICE, dtype=DTYPE)
    one = torch.ones(HEAD_DIM, device=DEVICE, dtype=DTYPE)

    def swiglu() -> Tensor:
        gate, up = inner.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    for name, run, moved in (
        (
            "norm of all heads",
            lambda: F.rms_norm(x.unflatten(-1, (-1, HEAD_DIM)), (HEAD_DIM,), None, 1e-6),
            2 * x.nbytes,
        ),
        ("SwiGLU", swiglu, 2.5 * inner.nbytes),
        ("launch of a tiny kernel", lambda: one.add_(0), 512),
    ):
        _, later = seconds(run)
        say("small", name=name, us=round(1e6 * later, 1), gbs=round(moved / later / 1e9))


def graphs() -> None:
    """Whether a CUDA graph of this attention can be captured and replayed, on a stream of its own."""
    if CPU:
        say("graphs", skipped="there is no GPU")
        return
    query = torch.randn(4, HEADS, HEAD_DIM, device=DEVICE, dtype=DTYPE)
    key, value = (torch.randn(4096, KV_HEADS, HEAD_DIM, device=DEVICE, dtype=DTYPE) for _ in range(2))
    (group,) = grouped([KeySpan(row, row + 1, 1024 * row, 100 + row, causal=True) for row in range(4)])
    numbers = torch.tensor(numbers_of(group), dtype=torch.int32, device=DEVICE)
    call, graph = call_of(group, numbers, 1024), torch.cuda.CUDAGraph()
    with torch.inference_mode(), torch.cuda.stream(torch.cuda.Stream(DEVICE)):
        varlen_attention(query, key, value, call)
        torch.cuda.current_stream(DEVICE).synchronize()
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream(DEVICE), capture_error_mode="thread_local"):
            out = varlen_attention(query, key, value, call)
        numbers[-4:] += 300  # longer contexts, the same graph
        expected = varlen_attention(query, key, value, call)
        graph.replay()
        torch.cuda.current_stream(DEVICE).synchronize()
        say("graphs", equal=bool(torch.equal(out, expected)))


def main() -> None:
    """Every section."""
    for section in (facts, attention, products, small, graphs):
        started = time.perf_counter()
        try:
            section()
        except Exception as error:
            say(section.__name__, error=f"{type(error).__name__}: {str(error)[:300]}")
        say(section.__name__, took=round(time.perf_counter() - started, 1))


if __name__ == "__main__":
    main()
