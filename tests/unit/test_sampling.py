"""Penalties, bias and cuts of the distribution, beside the plain formulas of OpenAI and vLLM."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from bagel_triton.model.sampling import (
    Choice,
    Sampler,
    TextState,
    added,
    distribution,
    draw,
    log_probabilities,
    penalised,
)
from bagel_triton.protocol.messages import Decoding

LOGITS = [2.0, -1.0, 0.5, 1.0, -3.0, 0.0]


def _changed(change: Callable[..., torch.Tensor], entries: dict[int, float]) -> list[float]:
    logits = torch.tensor([[0.0] * len(LOGITS), LOGITS])
    at = torch.tensor([len(LOGITS) + token for token in entries])
    other, row = change(logits, at, torch.tensor([*entries.values()])).tolist()
    assert other == [0.0] * len(LOGITS)
    assert logits[1].tolist() == LOGITS  # its input is left alone
    return row


def test_repetition_divides_positive_logits_and_multiplies_negative_ones() -> None:
    assert _changed(penalised, {0: 2.0, 4: 2.0}) == pytest.approx([1.0, -1.0, 0.5, 1.0, -6.0, 0.0])


def test_a_bias_is_added() -> None:
    assert _changed(added, {5: 100.0, 0: -100.0}) == pytest.approx([-98.0, -1.0, 0.5, 1.0, -3.0, 100.0])


def test_frequency_counts_and_presence_does_not() -> None:
    how = Decoding("answer", 0, 1, frequency_penalty=0.5, presence_penalty=0.25)
    text = TextState(how, torch.Generator(), {0, 4, 5}, {0: 3, 4: 1})
    assert text.changes() == ([], [], [(0, -1.75), (4, -0.75)])


def _plain(temperature: float) -> list[float]:
    weights = [math.exp(logit / temperature) for logit in LOGITS]
    return [weight / sum(weights) for weight in weights]


def _renormalised(chances: list[float], kept: list[bool]) -> list[float]:
    total = sum(chance for chance, keep in zip(chances, kept, strict=True) if keep)
    return [chance / total if keep else 0.0 for chance, keep in zip(chances, kept, strict=True)]


def _distribution(temperature: float, **cuts: Any) -> list[float]:
    kept = distribution(torch.tensor([LOGITS]), torch.tensor([[temperature]]), **cuts)[0]
    return (kept / kept.sum()).tolist()


@pytest.mark.parametrize("min_p", [0.01, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_min_p_is_relative_to_the_most_probable_token(min_p: float, temperature: float) -> None:
    chances = _plain(temperature)
    expected = _renormalised(chances, [chance >= min_p * max(chances) for chance in chances])
    assert _distribution(temperature, min_p=torch.tensor([[min_p]])) == pytest.approx(expected, abs=1e-6)


def test_top_k_and_nucleus_keep_the_most_probable_tokens() -> None:
    chances = _plain(1.0)  # in order of probability: 0, 3, 2, 5, 1, 4
    top_k = _distribution(1.0, top_k=(torch.tensor([[2]]), 2))
    assert top_k == pytest.approx(_renormalised(chances, [True, False, False, True, False, False]))
    reach = chances[0] + chances[3] / 2  # the token that crosses it is in
    nucleus = _distribution(1.0, top_p=torch.tensor([[reach]]))
    assert nucleus == pytest.approx(_renormalised(chances, [True, False, False, True, False, False]))
    assert _distribution(1.0, top_p=torch.tensor([[1e-30]])) == [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]


def test_numbers_spread_evenly_draw_tokens_as_often_as_they_are_probable() -> None:
    """So what is drawn has the distribution of torch's own multinomial, which needs a generator on each device."""
    count = 20_000
    chances = torch.tensor(_plain(0.8), dtype=torch.float32)
    chances[2] = 0.0  # cut off
    numbers = ((torch.arange(count, dtype=torch.float64) + 0.5) / count)[:, None]
    drawn = torch.bincount(draw(chances.expand(count, -1), numbers), minlength=len(LOGITS)) / count
    assert drawn.tolist() == pytest.approx((chances / chances.sum()).tolist(), abs=1.5 / count)
    assert drawn[2] == 0.0
    assert draw(torch.tensor([[0.5, torch.nan], [0.5, 0.5]]), torch.tensor([[0.9], [0.9]])).tolist() == [-1, 1]


def test_log_probabilities_are_of_the_logits_as_they_are() -> None:
    ((own, *best),) = log_probabilities(torch.tensor([LOGITS]), torch.tensor([4]), top=3).tolist()
    chances = _plain(1.0)
    assert own == pytest.approx(math.log(chances[4]), abs=1e-5)
    assert best[:3] == [0, 3, 2]
    assert best[3:] == pytest.approx([math.log(chances[token]) for token in (0, 3, 2)], abs=1e-5)


HOWS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 5, "top_logprobs": 0},
    {"temperature": 1.3, "top_p": 0.6},
    {"repetition_penalty": 1.4, "top_logprobs": 3},
    {"temperature": 2.0, "min_p": 0.1, "frequency_penalty": 0.7, "presence_penalty": -0.3, "top_logprobs": 20},
    {"logit_bias": {7: 50.0}, "frequency_penalty": 0.5},
    {"temperature": 1.0, "top_k": 1000, "top_p": 0.9, "repetition_penalty": 0.8},
]


def test_texts_chosen_together_are_those_chosen_one_by_one() -> None:
    """A GPU chooses for all texts of a step at once, whatever each wants; the greedy ones are the CPU's."""
    logits = torch.randn(len(HOWS), 64, generator=torch.Generator().manual_seed(0)) * 2

    def texts() -> list[TextState]:
        return [
            TextState(Decoding("answer", 0, 1, **how), torch.Generator().manual_seed(row), {1, row, 9}, {row: 2, 9: 1})
            for row, how in enumerate(HOWS)
        ]

    sampler, one_by_one, together = Sampler(torch.device("cpu")), texts(), texts()
    for _ in range(20):
        singles = sampler(logits, logits.argmax(dim=-1), one_by_one)
        for alone, ours in zip(singles, sampler.choose(logits, together), strict=True):
            assert ours.token_id == alone.token_id
            assert ours.logprob == pytest.approx(alone.logprob, abs=1e-6)
            assert [token for token, _ in ours.top] == [token for token, _ in alone.top]
    assert singles[0] == Choice(int(logits[0].argmax()))
    assert singles[6].token_id == 7
    assert [len(choice.top) for choice in singles] == [0, 0, 0, 0, 3, 20, 0, 0]


def test_a_seed_decides_what_is_drawn() -> None:
    sampler, logits = Sampler(torch.device("cpu")), torch.tensor([LOGITS])

    def drawn() -> list[int]:
        text = TextState(Decoding("answer", 0, 1, temperature=1.0), torch.Generator().manual_seed(5), (), {})
        return [sampler(logits, logits.argmax(dim=-1), [text])[0].token_id for _ in range(40)]

    assert drawn() == drawn()
    assert len(set(drawn())) > 2
