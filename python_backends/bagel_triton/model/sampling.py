"""Sampling the next token from its logits, as pure functions.

The order is vLLM's: bias, repetition penalty, frequency and presence penalties, temperature,
min-p, top-k, nucleus. Log-probabilities are of the logits before all of these.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor


def add_bias(logits: Tensor, bias: Mapping[int, float]) -> Tensor:
    """``logits`` [vocabulary] with ``bias`` added, by token id."""
    ids = torch.tensor([*bias], dtype=torch.long, device=logits.device)
    return logits.index_add(0, ids, torch.tensor([*bias.values()], dtype=logits.dtype, device=logits.device))


def penalise_repetition(logits: Tensor, seen: Collection[int], penalty: float) -> Tensor:
    """``logits`` [vocabulary] with every token in ``seen`` made less likely (CTRL, 2019)."""
    ids = torch.tensor([*seen], dtype=torch.long, device=logits.device)
    scores = logits[ids]
    return logits.scatter(0, ids, torch.where(scores > 0, scores / penalty, scores * penalty))


def penalise_counts(logits: Tensor, counts: Mapping[int, int], frequency: float, presence: float) -> Tensor:
    """``logits`` [vocabulary] less ``frequency`` times its count and ``presence``, for each counted token (OpenAI)."""
    return add_bias(logits, {token: -(frequency * count + presence) for token, count in counts.items()})


def distribution(logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float = 0.0) -> Tensor:
    """Probabilities [vocabulary] after temperature, then min-p (0: all), top-k (0: all) and nucleus.

    min-p keeps tokens at least ``min_p`` times as probable as the most probable one.
    """
    logits = logits / temperature
    if min_p > 0.0:
        logits = logits.masked_fill(logits.softmax(-1) < min_p * logits.softmax(-1).max(), -torch.inf)
    if 0 < top_k < logits.numel():
        logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], -torch.inf)
    probabilities = logits.softmax(dim=-1)
    if top_p < 1.0:
        ordered, order = probabilities.sort(descending=True, stable=True)
        outside = ordered.cumsum(0) - ordered >= top_p  # the token that crosses top_p is inside
        outside[0] = False  # in float32 a tiny top_p is 0
        probabilities[order[outside]] = 0.0
        probabilities = probabilities / probabilities.sum()
    return probabilities


def sample(probabilities: Tensor, generator: torch.Generator | None) -> int:
    """A token id drawn from ``probabilities`` [vocabulary] on the CPU."""
    return int(torch.multinomial(probabilities, 1, generator=generator))


def log_probabilities(logits: Tensor, token_id: int, top: int) -> tuple[float, list[tuple[int, float]]]:
    """Natural log-probability of ``token_id``, and (id, log-probability) of the ``top`` best tokens, best first."""
    values = logits.float().log_softmax(dim=-1)
    best = values.topk(min(top, values.numel()))
    return float(values[token_id]), list(zip(best.indices.tolist(), best.values.tolist(), strict=True))
