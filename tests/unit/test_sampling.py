"""Penalties, bias and cuts of the distribution, beside the plain formulas of OpenAI and vLLM."""

from __future__ import annotations

import math

import pytest
import torch

from bagel_triton.model.sampling import (
    add_bias,
    distribution,
    log_probabilities,
    penalise_counts,
    penalise_repetition,
    sample,
)

LOGITS = [2.0, -1.0, 0.5, 1.0, -3.0, 0.0]


def test_frequency_counts_and_presence_does_not() -> None:
    shaped = penalise_counts(torch.tensor(LOGITS), {0: 3, 4: 1}, frequency=0.5, presence=0.25).tolist()
    assert shaped == pytest.approx([2.0 - 3 * 0.5 - 0.25, -1.0, 0.5, 1.0, -3.0 - 0.5 - 0.25, 0.0])


def test_a_negative_penalty_makes_tokens_more_likely() -> None:
    shaped = penalise_counts(torch.tensor(LOGITS), {1: 2}, frequency=-1.0, presence=-2.0)
    assert shaped.tolist() == pytest.approx([2.0, -1.0 + 2 * 1.0 + 2.0, 0.5, 1.0, -3.0, 0.0])


def test_repetition_divides_positive_logits_and_multiplies_negative_ones() -> None:
    shaped = penalise_repetition(torch.tensor(LOGITS), {0, 4}, 2.0)
    assert shaped.tolist() == pytest.approx([1.0, -1.0, 0.5, 1.0, -6.0, 0.0])


def test_a_bias_is_added_and_leaves_its_input_alone() -> None:
    logits = torch.tensor(LOGITS)
    assert add_bias(logits, {5: 100.0, 0: -100.0}).tolist() == pytest.approx([-98.0, -1.0, 0.5, 1.0, -3.0, 100.0])
    assert logits.tolist() == LOGITS


def _plain(temperature: float) -> list[float]:
    weights = [math.exp(logit / temperature) for logit in LOGITS]
    return [weight / sum(weights) for weight in weights]


def _renormalised(chances: list[float], kept: list[bool]) -> list[float]:
    total = sum(chance for chance, keep in zip(chances, kept, strict=True) if keep)
    return [chance / total if keep else 0.0 for chance, keep in zip(chances, kept, strict=True)]


@pytest.mark.parametrize("min_p", [0.01, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_min_p_is_relative_to_the_most_probable_token(min_p: float, temperature: float) -> None:
    chances = _plain(temperature)
    expected = _renormalised(chances, [chance >= min_p * max(chances) for chance in chances])
    result = distribution(torch.tensor(LOGITS), temperature, top_k=0, top_p=1.0, min_p=min_p).tolist()
    assert result == pytest.approx(expected, abs=1e-6)


def test_top_k_and_nucleus_keep_the_most_probable_tokens() -> None:
    chances = _plain(1.0)  # in order of probability: 0, 3, 2, 5, 1, 4
    top_k = distribution(torch.tensor(LOGITS), 1.0, top_k=2, top_p=1.0).tolist()
    assert top_k == pytest.approx(_renormalised(chances, [True, False, False, True, False, False]))
    reach = chances[0] + chances[3] / 2  # the token that crosses it is in
    nucleus = distribution(torch.tensor(LOGITS), 1.0, top_k=0, top_p=reach).tolist()
    assert nucleus == pytest.approx(_renormalised(chances, [True, False, False, True, False, False]))


def test_a_seed_decides_what_is_sampled() -> None:
    chances = torch.tensor(_plain(1.0))
    draws = [[sample(chances, torch.Generator().manual_seed(seed)) for seed in range(40)] for _ in range(2)]
    assert draws[0] == draws[1]
    assert len(set(draws[0])) > 2


def test_log_probabilities_are_of_the_logits_as_they_are() -> None:
    own, best = log_probabilities(torch.tensor(LOGITS), 4, top=3)
    chances = _plain(1.0)
    assert own == pytest.approx(math.log(chances[4]), abs=1e-5)
    assert [token for token, _ in best] == [0, 3, 2]
    assert [value for _, value in best] == pytest.approx([math.log(chances[token]) for token in (0, 3, 2)], abs=1e-5)
    assert log_probabilities(torch.tensor(LOGITS), 4, top=0) == (own, [])
