"""Orthogonalised momentum (Muon) for kernels of convolutions and for matrices.

``torch.optim.Muon`` takes matrices only and works in bfloat16, which a CPU may emulate. AdamW at a
rate that learns fast enough from nothing moved the kernels by several percent a step, and outlines
stayed blurred.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from build.tiny_bagel.parallel import Ranks

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
    """Steps for kernels of two or more dimensions; the first is that of the outputs.

    Every rank computes the updates of its share of the parameters.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], ranks: Ranks) -> None:
        self._parameters, self._ranks = list(parameters), ranks
        self._momenta = [torch.zeros_like(parameter) for parameter in self._parameters]

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Move the parameters; their gradients are lost.

        Args:
            rate: of a square matrix, whose update has singular values of about 1.
        """
        stepped = [(p, m) for p, m in zip(self._parameters, self._momenta, strict=True) if p.grad is not None]
        for index, (parameter, momentum) in enumerate(stepped):
            assert parameter.grad is not None
            momentum.lerp_(parameter.grad, 1 - MOMENTUM)
            if index % self._ranks.count == self._ranks.rank:
                update = orthogonal(parameter.grad.lerp(momentum, MOMENTUM).flatten(1))
                parameter.grad.copy_(update.view(parameter.shape))
            else:
                parameter.grad.zero_()
        self._ranks.average([parameter for parameter, _ in stepped], [])
        for parameter, _ in stepped:
            assert parameter.grad is not None
            rows, columns = parameter.flatten(1).shape
            step = rate * self._ranks.count * max(1.0, rows / columns) ** 0.5
            parameter.add_(parameter.grad, alpha=-step)

    def state(self) -> list[Tensor]:
        return self._momenta

    def load(self, state: list[Tensor]) -> None:
        self._momenta = state
