"""The amount of arithmetic in a step, and this machine's rate of such arithmetic."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import torch

from bagel_triton.model.config import LanguageConfig, ModelConfig
from bagel_triton.model.cpu.row_stable import onednn_pieces, onednn_product, takes_onednn

RATE_TRIALS = 5


def products(config: LanguageConfig) -> list[tuple[int, int]]:
    """(inner, outer) of one layer's matrix products for a token."""
    hidden, inner = config.hidden_size, config.intermediate_size
    query, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    attention = [(hidden, query), (hidden, kv), (hidden, kv), (query, hidden)]
    return [*attention, (hidden, inner), (hidden, inner), (inner, hidden)]


def step_flops(config: ModelConfig, branches: Sequence[tuple[int, int]]) -> int:
    """Floating-point operations of one step of the flow: linear layers and attention.

    ``branches`` are (new tokens, tokens of the past) each; nothing but matrix products is counted.
    """
    language = config.language
    tokens = sum(new for new, _ in branches)
    linear = tokens * sum(inner * outer for inner, outer in products(language))
    scores = sum(new * (new + past) for new, past in branches) * language.num_heads * language.head_dim
    ends = 2 * tokens * language.hidden_size * config.latent.token_channels
    return 2 * (language.num_layers * (linear + 2 * scores) + ends)


def matmul_rate(shapes: Sequence[tuple[int, int]], rows: int, device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of plain matrix products of ``rows`` rows, of all ``shapes`` (inner, outer) together.

    By oneDNN where that is the faster library here, otherwise by torch's own product into memory that is there.
    """
    operands = [
        (
            torch.randn(rows, inner, device=device).to(dtype),
            torch.randn(outer, inner, device=device).to(dtype),
            torch.empty(rows, outer, device=device, dtype=dtype),
        )
        for inner, outer in shapes
    ]
    times = []
    for _ in range(1 + RATE_TRIALS):
        synchronize(device)
        started = time.perf_counter()
        for x, weight, out in operands:
            if x.is_cpu and takes_onednn(dtype):
                for start, size in onednn_pieces(rows):
                    onednn_product(x[start : start + size], weight)
            else:
                torch.mm(x, weight.t(), out=out)
        synchronize(device)
        times.append(time.perf_counter() - started)
    return 2 * rows * sum(inner * outer for inner, outer in shapes) / statistics.median(times[1:])


def synchronize(device: torch.device) -> None:
    """Wait for a GPU's queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
