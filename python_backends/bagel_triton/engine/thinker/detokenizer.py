"""One decoded text as it grows: detokenised, stopped, and split from its thinking."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from bagel_triton.model.tokenizer import Tokenizer
from bagel_triton.protocol.events import TextEvent
from bagel_triton.protocol.messages import Answer, Decoding

THINK_START, THINK_END = "<think>", "</think>"
Channel = Literal["content", "reasoning"]


def _held(text: str, markers: tuple[str, ...]) -> int:
    """Length of the longest end of ``text`` that could begin one of ``markers``."""
    longest = max((len(marker) for marker in markers), default=0) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(marker.startswith(text[-length:]) for marker in markers):
            return length
    return 0


class IncrementalDetokenizer:
    """Answer ``index`` of a request; feed it tokens until :attr:`finish_reason` is set.

    Text is released as early as it is certain: not while it may be half a character,
    the start of a stop text, or of a thinking tag. With ``split_thinking``, text between
    a leading ``<think>`` and ``</think>`` is reasoning; where the closing tag never
    comes, all of it is the answer after all.
    """

    def __init__(self, index: int, decoding: Decoding, tokenizer: Tokenizer) -> None:
        self._index, self._decoding, self._end = index, decoding, tokenizer.end
        self._stream = tokenizer.stream()
        self.tokens: list[int] = []
        self.finish_reason: Literal["stop", "length"] | None = None
        self._text = ""  # all that is certain, after stop texts
        self._pending = ""  # not certain yet
        self._tag: Literal["before", "inside", "after"] = "before" if decoding.split_thinking else "after"
        self._reasoning_tokens = 0
        default: Channel = "reasoning" if decoding.purpose == "think" else "content"
        self._channel: Channel = default

    def push(self, token_id: int) -> Iterator[TextEvent]:
        """Take one token; the text that became certain."""
        if token_id == self._end:
            yield from self._finish("stop")
            return
        self.tokens.append(token_id)
        self._pending += self._stream.push(token_id)
        yield from self._release(final=False)
        if self.finish_reason is None and self._exhausted():
            yield from self._finish("length")

    def _exhausted(self) -> bool:
        limit = self._decoding.max_think_tokens
        thinking = self._decoding.split_thinking and self._tag != "after"
        return len(self.tokens) >= self._decoding.max_new_tokens or (
            thinking and limit is not None and len(self.tokens) >= limit
        )

    def _finish(self, reason: Literal["stop", "length"]) -> Iterator[TextEvent]:
        self._pending += self._stream.flush()
        yield from self._release(final=True)
        if self.finish_reason is None:
            self.finish_reason = reason

    def _release(self, final: bool) -> Iterator[TextEvent]:
        stops = self._decoding.stop
        cut = min((at for at in (self._pending.find(stop) for stop in stops) if at >= 0), default=-1)
        if cut >= 0:
            self._pending, final = self._pending[:cut], True
            self.finish_reason = "stop"
        held = 0 if final else _held(self._pending, stops)
        fresh, self._pending = self._pending[: len(self._pending) - held], self._pending[len(self._pending) - held :]
        self._text += fresh
        yield from self._split(fresh, final)

    # --- thinking ---

    _buffer = ""  # text whose channel is not known yet

    def _split(self, fresh: str, final: bool) -> Iterator[TextEvent]:
        self._buffer += fresh
        if self._tag == "before":
            start = self._buffer.lstrip()
            if start.startswith(THINK_START):
                self._tag, self._buffer = "inside", start.removeprefix(THINK_START)
            elif final or not THINK_START.startswith(start):
                self._tag = "after"
        if self._tag == "inside":
            yield from self._think(final)
        if self._tag == "after":
            yield from self._event(self._channel, self._buffer)
            self._buffer = ""

    def _think(self, final: bool) -> Iterator[TextEvent]:
        thought, tag, rest = self._buffer.partition(THINK_END)
        if tag:
            yield from self._event("reasoning", thought)
            self._tag, self._buffer, self._reasoning_tokens = "after", rest, len(self.tokens)
        elif final and self._channel == "content":
            # No closing tag came: what was streamed as thinking was the answer.
            self._tag, self._buffer = "after", self._text
        elif final:
            self._tag = "after"
        else:
            keep = _held(self._buffer, (THINK_END,))
            yield from self._event("reasoning", self._buffer[: len(self._buffer) - keep])
            self._buffer = self._buffer[len(self._buffer) - keep :]

    def _event(self, channel: Channel, text: str) -> Iterator[TextEvent]:
        if text:
            yield TextEvent(self._index, channel, text)

    # --- the result ---

    @property
    def text(self) -> str:
        """All of the text, thinking and tags included."""
        return self._text

    def answer(self) -> Answer:
        """The finished answer."""
        content, reasoning, thought_tokens = self._text, "", self._reasoning_tokens
        if self._decoding.split_thinking:
            reasoning, content = split_thinking(self._text)
        if self._decoding.purpose == "think":  # for an image: all of it, but for the tags
            reasoning, content = reasoning + content, ""
            if not thought_tokens:
                reasoning = reasoning.removeprefix(THINK_START)
            thought_tokens = len(self.tokens)
        return Answer(
            content=content,
            reasoning=reasoning,
            finish_reason=self.finish_reason or "length",
            tokens=len(self.tokens),
            reasoning_tokens=thought_tokens,
        )


def split_thinking(text: str) -> tuple[str, str]:
    """(reasoning, answer) of a whole text; without both tags, all of it is the answer."""
    start = text.lstrip()
    if start.startswith(THINK_START):
        thought, tag, rest = start.removeprefix(THINK_START).partition(THINK_END)
        if tag:
            return thought, rest
    return "", text
