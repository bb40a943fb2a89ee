"""Sampling fields at the thinker: what each does to a text, and that neutral ones do nothing."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from bagel_triton.engine.thinker.detokenizer import IncrementalDetokenizer
from bagel_triton.engine.thinker.run import TextDecoder
from bagel_triton.model.sampling import Sampler
from bagel_triton.model.tokenizer import Tokenizer
from bagel_triton.pipeline.local import LocalStages
from bagel_triton.pipeline.pipeline import Pipeline
from bagel_triton.protocol.events import AnswerEvent, TextEvent
from bagel_triton.protocol.messages import Decoding
from bagel_triton.protocol.request import GenerationRequest


def _answers(stages: LocalStages, **fields: Any) -> tuple[list[TextEvent], list[AnswerEvent]]:
    request = GenerationRequest("Where is it?", modality="text", **{"max_tokens": 12, "seed": 4} | fields)
    events = list(Pipeline(stages, 60.0).run(request))
    texts = [event for event in events if isinstance(event, TextEvent)]
    return texts, [event for event in events if isinstance(event, AnswerEvent)]


def _content(stages: LocalStages, **fields: Any) -> str:
    _, (answer,) = _answers(stages, **fields)
    return answer.content


NEUTRAL: dict[str, Any] = {
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "repetition_penalty": 1.0,
    "min_p": 0.0,
    "logit_bias": {},
    "top_logprobs": 3,
}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_neutral_fields_change_no_text(local_stages: LocalStages, temperature: float) -> None:
    plain = _content(local_stages, temperature=temperature)
    assert _content(local_stages, temperature=temperature, **NEUTRAL) == plain


def test_a_bias_forces_and_forbids_tokens(local_stages: LocalStages, checkpoint_dir: Path) -> None:
    (token,) = Tokenizer(checkpoint_dir).encode("x")
    assert _content(local_stages, logit_bias={token: 100.0}) == "x" * 12
    fields = {"top_logprobs": 0, "temperature": 2.0, "max_tokens": 200}
    usual, forbidden = (
        {entry.token for entry in _answers(local_stages, **fields, logit_bias=bias)[1][0].logprobs}
        for bias in ({}, {token: -100.0})
    )
    assert "x" not in forbidden
    assert len(usual) > 20


@pytest.mark.parametrize(("fields", "tokens"), [({}, 0), ({"min_tokens": 5}, 5), ({"ignore_eos": True}, 12)], ids=str)
def test_a_text_goes_on_for_as_long_as_it_must(
    local_stages: LocalStages, checkpoint_dir: Path, fields: dict[str, Any], tokens: int
) -> None:
    always_ends = {"logit_bias": {Tokenizer(checkpoint_dir).end: 100.0}}
    _, (answer,) = _answers(local_stages, **always_ends, top_logprobs=0, **fields)
    assert len(answer.logprobs) == tokens
    assert answer.finish_reason == ("length" if tokens == 12 else "stop")


def test_a_min_p_of_one_is_greedy(local_stages: LocalStages) -> None:
    assert _content(local_stages, min_p=1.0, temperature=2.0) == _content(local_stages)


def test_log_probabilities_are_streamed_and_are_those_of_the_greedy_choice(local_stages: LocalStages) -> None:
    texts, (answer,) = _answers(local_stages, top_logprobs=2)
    assert [entry for event in texts for entry in event.logprobs] == list(answer.logprobs)
    assert len(answer.logprobs) > 1
    for entry in answer.logprobs:
        first, second = entry.top
        assert (entry.token, entry.bytes, entry.logprob) == (first.token, first.bytes, first.logprob)
        assert second.logprob <= first.logprob <= 0.0
    data = b"".join(bytes(entry.bytes) for entry in answer.logprobs)
    assert data.decode(errors="replace") == answer.content


def test_penalties_and_temperature_leave_log_probabilities_alone(
    local_stages: LocalStages, checkpoint_dir: Path
) -> None:
    """They are the model's own, as vLLM's raw log-probabilities: the first token's do not depend on sampling."""
    (token,) = Tokenizer(checkpoint_dir).encode("x")
    _, (plain,) = _answers(local_stages, top_logprobs=5, max_tokens=1)
    _, (forced,) = _answers(local_stages, top_logprobs=5, max_tokens=1, logit_bias={token: 100.0}, temperature=2.0)
    assert forced.content == "x"
    assert forced.logprobs[0].top == plain.logprobs[0].top
    assert forced.logprobs[0].logprob < -1.0


def test_no_log_probabilities_unless_wanted(local_stages: LocalStages) -> None:
    texts, (answer,) = _answers(local_stages)
    assert answer.logprobs == ()
    assert all(event.logprobs == () for event in texts)
    _, (own,) = _answers(local_stages, top_logprobs=0)
    assert own.logprobs
    assert all(entry.top == () for entry in own.logprobs)


def _greedy_by_formula(logits: list[float], prompt: set[int], how: Decoding, steps: int) -> list[int]:
    """Token ids by the definitions alone, for logits that never change."""
    chosen: list[int] = []
    for _ in range(steps):
        scores = list(logits)
        for token in range(len(scores)):
            scores[token] += how.logit_bias.get(token, 0.0)
            if token in prompt or token in chosen:
                by = how.repetition_penalty
                scores[token] = scores[token] / by if scores[token] > 0 else scores[token] * by
            count = chosen.count(token)
            scores[token] -= count * how.frequency_penalty + (count > 0) * how.presence_penalty
        chosen.append(max(range(len(scores)), key=lambda token: scores[token]))
    return chosen


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"frequency_penalty": 0.4},
        {"presence_penalty": 1.1},
        {"frequency_penalty": 0.3, "presence_penalty": -0.2, "repetition_penalty": 1.3},
        {"frequency_penalty": -0.5, "logit_bias": {7: 3.0}},
        {"repetition_penalty": 1.7, "logit_bias": {2: -4.0, 5: 1.0}},
    ],
    ids=str,
)
def test_a_text_follows_the_definitions_step_by_step(checkpoint_dir: Path, fields: dict[str, Any]) -> None:
    tokenizer = Tokenizer(checkpoint_dir)
    how = Decoding("answer", first_token=3, max_new_tokens=100, **fields)
    logits = torch.randn(16, generator=torch.Generator().manual_seed(1)) * 2
    decoder = TextDecoder(
        context=None,  # type: ignore[arg-type]
        decoding=how,
        tokenizer=tokenizer,
        detokenizer=IncrementalDetokenizer(0, how, tokenizer),
        generator=torch.Generator(),
        last_token=3,
        seen={1, 2, 3},
    )
    chosen = []
    for _ in range(12):
        (choice,) = Sampler(logits.device)(logits[None], logits.argmax()[None], [decoder.state])
        chosen.append(choice.token_id)
        decoder.take(choice)
    assert chosen == _greedy_by_formula(logits.tolist(), {1, 2, 3}, how, 12)


def test_an_unlikely_token_has_a_finite_log_probability(local_stages: LocalStages) -> None:
    _, (answer,) = _answers(local_stages, top_logprobs=20)
    assert all(math.isfinite(top.logprob) for entry in answer.logprobs for top in entry.top)
