"""Tokens as text: what is certain, where it stops, what is thinking, and whose log-probabilities it has."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from bagel_triton.engine.thinker.detokenizer import IncrementalDetokenizer
from bagel_triton.model.tokenizer import Tokenizer
from bagel_triton.protocol.events import TextEvent
from bagel_triton.protocol.messages import Answer, Decoding, TokenLogprob


@pytest.fixture(scope="module")
def tokenizer(checkpoint_dir: Path) -> Tokenizer:
    return Tokenizer(checkpoint_dir)


def _decoding(**fields: object) -> Decoding:
    return Decoding("answer", first_token=0, max_new_tokens=1000, **fields)  # type: ignore[arg-type]


def _decode(
    tokenizer: Tokenizer, tokens: Sequence[int], decoding: Decoding, ended: bool = True
) -> tuple[list[TextEvent], Answer]:
    """The events and the answer of ``tokens``, the log-probability of each being minus its number."""
    detokenizer = IncrementalDetokenizer(0, decoding, tokenizer)
    events: list[TextEvent] = []
    for number, token in enumerate(tokens):
        data = tokenizer.token_bytes(token)
        events += detokenizer.push(token, TokenLogprob(data.decode(errors="replace"), tuple(data), -float(number)))
        if detokenizer.finish_reason is not None:
            break
    else:
        events += detokenizer.push(tokenizer.end) if ended else ()
    return events, detokenizer.answer()


def _numbers(logprobs: Sequence[TokenLogprob]) -> list[int]:
    return [round(-entry.logprob) for entry in logprobs]


def _sent(events: Sequence[TextEvent]) -> list[TokenLogprob]:
    return [entry for event in events for entry in event.logprobs]


TEXT = "Ein Café, 山 und 🙂."


def test_the_bytes_of_a_texts_tokens_are_the_texts(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode(TEXT)
    assert b"".join(map(tokenizer.token_bytes, tokens)).decode() == TEXT
    assert tokenizer.token_bytes(tokenizer.end) == b"<|im_end|>"
    assert tokenizer.token_bytes(10**6) == b""


def test_each_tokens_log_probability_comes_once_with_the_text_it_belongs_to(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode(TEXT)
    events, answer = _decode(tokenizer, tokens, _decoding())
    assert "".join(event.text for event in events) == answer.content == TEXT
    assert _numbers(answer.logprobs) == list(range(len(tokens)))
    assert _sent(events) == list(answer.logprobs)
    for event in events:  # pieces of a character come together
        assert b"".join(bytes(entry.bytes) for entry in event.logprobs).decode() == event.text


def test_a_text_that_ends_within_a_character_has_its_pieces(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("a山")[:-1]
    events, answer = _decode(tokenizer, tokens, _decoding())
    assert answer.content.startswith("a\ufffd")
    assert _sent(events) == list(answer.logprobs)
    assert len(answer.logprobs) == len(tokens)


def test_tokens_behind_a_stop_text_are_not_the_answers(tokenizer: Tokenizer) -> None:
    before, stop = tokenizer.encode("The answer"), tokenizer.encode("STOP")
    events, answer = _decode(tokenizer, [*before, *stop, *before], _decoding(stop=("STOP",)))
    assert (answer.content, answer.finish_reason) == ("The answer", "stop")
    assert _numbers(answer.logprobs) == _numbers(_sent(events)) == list(range(len(before)))


def test_thinking_has_a_channel_of_its_own_and_no_log_probabilities(tokenizer: Tokenizer) -> None:
    thought, content = tokenizer.encode("<think>Why山not</think>"), tokenizer.encode("Yes.")
    events, answer = _decode(tokenizer, [*thought, *content], _decoding(split_thinking=True))
    assert (answer.reasoning, answer.content, answer.reasoning_tokens) == ("Why山not", "Yes.", len(thought))
    assert "".join(event.text for event in events if event.channel == "reasoning") == "Why山not"
    assert [round(-entry.logprob) - len(thought) for entry in answer.logprobs] == list(range(len(content)))
    assert _sent(events) == list(answer.logprobs)


def test_thinking_that_never_closes_is_the_answer_with_all_its_tokens(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("<think>Why not")
    events, answer = _decode(tokenizer, tokens, _decoding(split_thinking=True))
    assert (answer.content, answer.reasoning, answer.reasoning_tokens) == ("<think>Why not", "", 0)
    assert (events[-1].channel, events[-1].text) == ("content", "<think>Why not")
    assert _numbers(_sent(events)) == _numbers(answer.logprobs) == list(range(len(tokens)))


@pytest.mark.parametrize(("fields", "tokens"), [({"max_think_tokens": 3}, 3), ({"max_think_tokens": 999}, 6)])
def test_thinking_and_text_end_at_their_limits(tokenizer: Tokenizer, fields: dict[str, int], tokens: int) -> None:
    decoding = Decoding("answer", 0, max_new_tokens=6, split_thinking=True, **fields)
    _, answer = _decode(tokenizer, tokenizer.encode("<think>one two three four five six"), decoding)
    assert (answer.tokens, answer.finish_reason) == (tokens, "length")
