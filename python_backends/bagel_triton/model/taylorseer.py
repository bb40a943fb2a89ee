"""TaylorSeer: most evaluations of a branch are extrapolated from the last computed ones.

Source: "From Reusing to Forecasting: Accelerating Diffusion Models with TaylorSeers"
(2025), with the schedule of the model authors' code.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import factorial

from torch import Tensor

WARM_UP = 4  # evaluations 0 to 4 are computed
INTERVAL = 3  # and every third from there on
MAX_ORDER = 6


@dataclass
class TaylorSeer:
    """One branch of one image; its counter moves only when the branch is evaluated.

    ``factors`` are finite-difference derivatives of the last hidden state before the final
    norm, each [tokens, hidden], the state itself first.
    """

    evaluations: int = 0
    last_computed: int = 0
    factors: list[Tensor] = field(default_factory=list)

    @property
    def due(self) -> bool:
        """Whether the next evaluation has to be computed."""
        return self.evaluations <= WARM_UP or (self.evaluations - WARM_UP) % INTERVAL == 0

    def update(self, hidden: Tensor) -> Tensor:
        """Record a computed evaluation, and return it."""
        factors = [hidden]
        if self.evaluations >= WARM_UP:
            distance = self.evaluations - self.last_computed
            for order, before in enumerate(self.factors[:MAX_ORDER]):
                factors.append((factors[order] - before) / distance)
        self.factors, self.last_computed = factors, self.evaluations
        self.evaluations += 1
        return hidden

    def extrapolate(self) -> Tensor:
        """Extrapolate the next evaluation's hidden state: the sum of f_i * x**i / i!."""
        x = self.evaluations - self.last_computed
        self.evaluations += 1
        state = self.factors[0]
        for order, factor in enumerate(self.factors[1:], start=1):
            state = state + factor * (x**order / factorial(order))
        return state
