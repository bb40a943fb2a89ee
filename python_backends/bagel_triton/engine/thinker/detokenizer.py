"""A decoded text while it grows: detokenised, cut at stop texts, and split from its thinking."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import Literal

from bagel_triton.model.tokenizer import Tokenizer
from bagel_triton.protocol.events import TextEvent
from bagel_triton.protocol.messages import Answer, Decoding, TokenLogprob

THINK_START, THINK_END = "<think>", "</think>"
Channel = Literal["content", "reasoning"]
FinishReason = Literal["stop", "length"]


def _held(text: str, markers: tuple[str, ...]) -> int:
    """Length of the longest end of ``text`` that could begin one of ``markers``."""
    longest = max((len(marker) for marker in markers), default=0) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(marker.startswith(text[-length:]) for marker in markers):
            return length
    return 0


class ReasoningParser:
    """Splits a growing text into thinking and answer.

    Thinking stands between a leading ``<think>`` and ``</think>``. If the closing tag never
    comes, the whole text is the answer after all, tag included, and is released again as such.

    Args:
        split: whether to look for the tags; without them all text goes to ``channel``.
        channel: where text outside the tags goes.
    """

    def __init__(self, split: bool, channel: Channel) -> None:
        self._channel: Channel = channel
        self._place: Literal["before", "inside", "after"] = "before" if split else "after"
        self._text = ""
        self._buffer = ""  # text whose channel is not known yet
        self.answer_at = 0  # characters of the text before the answer begins

    @property
    def thinking(self) -> bool:
        """Whether the answer has not begun."""
        return self._place != "after"

    def feed(self, text: str, final: bool) -> Iterator[tuple[Channel, str]]:
        """Take more text; the pieces whose channel is certain."""
        self._text += text
        self._buffer += text
        if self._place == "before":
            start = self._buffer.lstrip()
            if start.startswith(THINK_START):
                self._place, self._buffer = "inside", start.removeprefix(THINK_START)
            elif final or not THINK_START.startswith(start):
                self._place = "after"
        if self._place == "inside":
            yield from self._feed_thought(final)
        if self._place == "after":
            yield self._channel, self._buffer
            self._buffer = ""

    def _feed_thought(self, final: bool) -> Iterator[tuple[Channel, str]]:
        thought, tag, rest = self._buffer.partition(THINK_END)
        if tag:
            yield "reasoning", thought
            self._place, self._buffer, self.answer_at = "after", rest, len(self._text) - len(rest)
        elif final:
            self._place = "after"
            if self._channel == "content":
                self._buffer = self._text
        else:
            keep = _held(self._buffer, (THINK_END,))
            yield "reasoning", self._buffer[: len(self._buffer) - keep]
            self._buffer = self._buffer[len(self._buffer) - keep :]


class IncrementalDetokenizer:
    """Answer ``index`` of a request; takes tokens until :attr:`finish_reason` is set.

    Text is released as soon as it is certain: not while it may be half a character, the
    start of a stop text, or of a thinking tag. Log-probabilities travel with the answer's
    text that their tokens belong to; several tokens may share a character.
    """

    def __init__(self, index: int, decoding: Decoding, tokenizer: Tokenizer) -> None:
        self._index, self._decoding, self._end = index, decoding, tokenizer.end
        self._stream = tokenizer.stream()
        self._parser = ReasoningParser(
            decoding.split_thinking, "reasoning" if decoding.purpose == "think" else "content"
        )
        self.tokens: list[int] = []
        self.finish_reason: FinishReason | None = None
        self._text = ""  # all that is certain, cut at a stop text
        self._pending = ""  # not certain yet
        self._decoded = 0  # characters of both
        self._starts: list[int] = []  # characters before each token
        self._logprobs: list[TokenLogprob] = []  # of each token, if requested
        self._certain = 0  # tokens whose text is certain
        self._sent = 0  # tokens whose log-probabilities were sent, or are not the answer's

    def push(self, token_id: int, logprob: TokenLogprob | None = None) -> Iterator[TextEvent]:
        """Take one token; the text that became certain."""
        if token_id == self._end:
            yield from self._finish("stop")
            return
        self.tokens.append(token_id)
        self._starts.append(self._decoded)
        if logprob is not None:
            self._logprobs.append(logprob)
        self._take(self._stream.push(token_id))
        yield from self._release(final=False)
        if self.finish_reason is None and self._exhausted():
            yield from self._finish("length")

    def _take(self, text: str) -> None:
        self._pending += text
        self._decoded += len(text)

    def _exhausted(self) -> bool:
        limit = self._decoding.max_think_tokens
        return len(self.tokens) >= self._decoding.max_new_tokens or (
            self._parser.thinking and limit is not None and len(self.tokens) >= limit
        )

    def _finish(self, reason: FinishReason) -> Iterator[TextEvent]:
        self._take(self._stream.flush())
        yield from self._release(final=True)
        if self.finish_reason is None:
            self.finish_reason = reason

    def _release(self, final: bool) -> Iterator[TextEvent]:
        stops = self._decoding.stop
        cut = min((at for at in (self._pending.find(stop) for stop in stops) if at >= 0), default=-1)
        if cut >= 0:
            self._pending = self._pending[:cut]
            self.finish_reason = "stop"
        held = 0 if final or cut >= 0 else _held(self._pending, stops)
        fresh, self._pending = self._pending[: len(self._pending) - held], self._pending[len(self._pending) - held :]
        self._text += fresh
        self._certain = len(self.tokens) if final and cut < 0 else bisect_left(self._starts, len(self._text))
        for channel, text in self._parser.feed(fresh, final or cut >= 0):
            logprobs = self._fresh_logprobs() if channel == "content" else ()
            if text or logprobs:
                yield TextEvent(self._index, channel, text, logprobs)

    def _fresh_logprobs(self) -> tuple[TokenLogprob, ...]:
        start = max(self._sent, self._reasoning_tokens)
        self._sent = max(start, self._certain)
        return tuple(self._logprobs[start : self._sent])

    @property
    def _reasoning_tokens(self) -> int:
        """Tokens before the answer begins, the closing tag's included."""
        return bisect_left(self._starts, self._parser.answer_at)

    # --- the result ---

    @property
    def text(self) -> str:
        """The whole text, thinking and tags included."""
        return self._text

    def answer(self) -> Answer:
        """The finished answer."""
        content, reasoning, reasoning_tokens = self._text, "", self._reasoning_tokens
        logprobs: Sequence[TokenLogprob] = self._logprobs[reasoning_tokens : self._certain]
        if self._decoding.split_thinking:
            reasoning, content = split_thinking(self._text)
        if self._decoding.purpose == "think":  # an image follows: all of it is thinking, without the tags
            reasoning, content = reasoning + content, ""
            if not reasoning_tokens:
                reasoning = reasoning.removeprefix(THINK_START)
            reasoning_tokens = len(self.tokens)
        return Answer(
            content=content,
            reasoning=reasoning,
            finish_reason=self.finish_reason or "length",
            tokens=len(self.tokens),
            reasoning_tokens=reasoning_tokens,
            logprobs=tuple(logprobs),
        )


def split_thinking(text: str) -> tuple[str, str]:
    """(thinking, answer) of a whole text; without both tags, all of it is the answer."""
    start = text.lstrip()
    if start.startswith(THINK_START):
        thought, tag, rest = start.removeprefix(THINK_START).partition(THINK_END)
        if tag:
            return thought, rest
    return "", text
