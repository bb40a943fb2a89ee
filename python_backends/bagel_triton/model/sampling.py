"""Choosing the next token from its scores, as pure functions."""

from __future__ import annotations

import torch
from torch import Tensor


def penalised(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """``logits`` [vocabulary] with every token in ``seen`` [n] made less likely (CTRL, 2019)."""
    if penalty == 1.0:
        return logits
    scores = logits[seen]
    return logits.scatter(0, seen, torch.where(scores > 0, scores / penalty, scores * penalty))


def distribution(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """Probabilities [vocabulary] after temperature, then top-k (0: all), then nucleus."""
    logits = logits / temperature
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


def next_token(logits: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator | None) -> int:
    """The next token's id: the best-scored for temperature 0, else drawn with ``generator``."""
    if temperature == 0.0:
        return int(logits.argmax())
    probabilities = distribution(logits.float().cpu(), temperature, top_k, top_p)
    return int(torch.multinomial(probabilities, 1, generator=generator))
