"""Orthogonalised momentum (Muon) for convolutions.

``torch.optim.Muon`` takes matrices only and works in bfloat16, which a CPU may emulate. AdamW at a
rate that learns fast enough from nothing moved the kernels by several percent a step, and outlines
stayed blurred.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

MOMENTUM = 0.95
ITERATIONS = 5
_A, _B, _C = 3.4445, -4.7750, 2.0315
"""Of the published iteration, which brings all singular values near 1."""


def orthogonal(matrix: Tensor) -> Tensor:
    """``matrix`` [rows, columns] with its singular values near 1."""
    tall = matrix.shape[0] > matrix.shape[1]
    x: Tensor = matrix.T if tall else matrix
    x = x / (torch.linalg.matrix_norm(x) + 1e-7)
    for _ in range(ITERATIONS):
        square = x @ x.T
        x = _A * x + (_B * square + _C * square @ square) @ x
    return x.T if tall else x


class Muon:
    """Steps for kernels of two or more dimensions; the first is that of the outputs."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._parameters = list(parameters)
        self._momenta = [torch.zeros_like(parameter) for parameter in self._parameters]

    @torch.no_grad()
    def step(self, rate: float) -> None:
        for parameter, momentum in zip(self._parameters, self._momenta, strict=True):
            if parameter.grad is None:
                continue
            momentum.lerp_(parameter.grad, 1 - MOMENTUM)
            update = orthogonal(parameter.grad.lerp(momentum, MOMENTUM).flatten(1))
            rows, columns = update.shape
            parameter.add_(update.view(parameter.shape), alpha=-rate * max(1.0, rows / columns) ** 0.5)
