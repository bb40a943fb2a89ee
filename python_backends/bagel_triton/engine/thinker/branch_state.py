"""A guidance branch's context while it is prefilled, and the branches that fork from it."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, takewhile
from typing import Any

import numpy as np
from torch import Tensor

from bagel_triton.kv.block_pool import KVCachePool, KVSequence
from bagel_triton.model.config import ModelConfig, segment_tokens
from bagel_triton.model.lora import LoraAdapter
from bagel_triton.protocol.messages import Branch, BranchPlan, Segment, TextSegment, VaeSegment, VitSegment

TEXT_CHUNK = 512
OWN_CHUNKS = 32  # texts after so many segments share chunks: a long conversation takes a step for 512 tokens, not each


@dataclass(frozen=True)
class TextChunk:
    """Tokens to append causally; ``scored`` requests the last one's logits."""

    context: KVSequence
    token_ids: tuple[int, ...]
    scored: bool = False
    adapter: LoraAdapter | None = None

    @property
    def tokens(self) -> int:
        """Tokens this chunk appends."""
        return len(self.token_ids)


@dataclass(frozen=True)
class ImageChunk:
    """A whole image to append with bidirectional attention, its two markers included."""

    context: KVSequence
    segment: VitSegment | VaeSegment
    tokens: int
    noise: Tensor | None = None  # a VaeSegment's posterior draw, [1, channels, h, w]
    adapter: LoraAdapter | None = None


Chunk = TextChunk | ImageChunk


@dataclass(frozen=True)
class ChunkBoundary:
    """The end of a chunk: ``done`` whole segments and ``offset`` tokens of the next one come before it.

    ``key`` is a digest of everything before this point that determines the KV: the adapter, tokens,
    pixels, posterior draws, and the boundaries of the chunks.
    """

    key: bytes
    done: int
    offset: int
    tokens: int
    position: int  # the next RoPE position


_START = ChunkBoundary(b"", done=0, offset=0, tokens=0, position=0)


@dataclass(eq=False)
class BranchState:
    """One branch of one request while its context grows.

    A branch with the same beginning as an earlier one waits until that one has prefilled it,
    then forks its context: shared prefixes are prefilled once. ``draws`` are the posterior
    draws of the branch's images for generation, in order.
    """

    name: Branch
    segments: list[Segment]
    config: ModelConfig
    context: KVSequence
    draws: Sequence[Tensor] = ()
    adapter: LoraAdapter | None = None
    parent: BranchState | None = None
    shared: int = 0  # leading boundaries taken from the parent
    boundaries: list[ChunkBoundary] = field(default_factory=list)
    reached: int = 0  # boundaries that are in the context
    children: list[BranchState] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.boundaries.extend(self._boundaries_from(0))

    @property
    def waiting(self) -> bool:
        """Whether it still waits to be forked."""
        return self.parent is not None

    @property
    def complete(self) -> bool:
        """Whether every segment is in the context."""
        return not self.waiting and self.reached == len(self.boundaries)

    @property
    def keys(self) -> list[bytes]:
        """Keys of the chunks that are in the context, in order."""
        return [boundary.key for boundary in self.boundaries[: self.reached]]

    @property
    def total_tokens(self) -> int:
        """Tokens of the complete context."""
        return self.boundaries[-1].tokens if self.boundaries else 0

    @property
    def shared_tokens(self) -> int:
        """Tokens taken from the parent."""
        return self.boundaries[self.shared - 1].tokens if self.shared else 0

    def append(self, segment: Segment) -> None:
        """Add a segment at the end."""
        self.segments.append(segment)
        self.boundaries.extend(self._boundaries_from(len(self.segments) - 1))

    def next_chunk(self, budget: int, alone: bool) -> Chunk | None:
        """The next chunk to append, if it fits into ``budget`` tokens.

        An image is one chunk. Text is cut every ``TEXT_CHUNK`` tokens, and at the end of each of the first
        ``OWN_CHUNKS`` segments, where the next turn of a conversation finds it cached; nowhere else, so that a
        context's KV does not depend on the other requests of a step. A chunk that is ``alone`` in its step may exceed
        the budget.
        """
        if self.waiting or self.complete:
            return None
        before = self.boundaries[self.reached - 1] if self.reached else _START
        tokens = self.boundaries[self.reached].tokens - before.tokens
        if tokens > budget and not alone:
            return None
        segment = self.segments[before.done]
        if isinstance(segment, TextSegment):
            return TextChunk(self.context, self._texts(before, tokens), adapter=self.adapter)
        noise = self._draw(before.done) if isinstance(segment, VaeSegment) else None
        return ImageChunk(self.context, segment, tokens, noise, self.adapter)

    def advance(self) -> None:
        """Record that the next chunk is in the context; branches that waited for it fork."""
        self.reached += 1
        self.fork_children()

    def adopt(self, context: KVSequence, reached: int) -> None:
        """Continue from ``context``, which holds the first ``reached`` chunks."""
        self.context.free()
        if self.parent is not None:
            self.parent.children.remove(self)
        self.context, self.reached, self.parent = context, reached, None
        self.fork_children()

    def fork_children(self) -> None:
        """Fork the branches whose shared prefix is in the context."""
        for child in list(self.children):
            boundary = child.boundaries[child.shared - 1]
            if boundary.tokens <= self.context.tokens:
                child.adopt(self.context.fork_at(boundary.tokens, boundary.position), child.shared)

    @property
    def _start(self) -> ChunkBoundary:
        return _START if self.adapter is None else replace(_START, key=_key(b"lora", str(self.adapter.number).encode()))

    def _texts(self, before: ChunkBoundary, tokens: int) -> tuple[int, ...]:
        """The ``tokens`` ids of text that follow a boundary, of one segment or several."""
        ids: list[int] = []
        offset = before.offset
        for segment in self.segments[before.done :]:
            assert isinstance(segment, TextSegment), "a chunk of text holds no image"
            ids += segment.token_ids[offset : offset + tokens - len(ids)]
            if len(ids) == tokens:
                break
            offset = 0
        return tuple(ids)

    def _boundaries_from(self, first: int) -> Iterator[ChunkBoundary]:
        """The boundaries of the segments from number ``first`` on."""
        boundary = self.boundaries[-1] if self.boundaries else self._start
        for done, group in self._groups(first):
            segment = group[0]
            if isinstance(segment, TextSegment):
                ends = [*accumulate(segment_tokens(text, self.config) for text in group)]
                ids = np.concatenate([np.asarray(text.token_ids, dtype=np.int64) for text in group])
                for start in range(0, len(ids), TEXT_CHUNK):
                    stop = min(start + TEXT_CHUNK, len(ids))
                    whole = bisect_right(ends, stop)
                    place = done + whole, stop - (ends[whole - 1] if whole else 0)
                    key = _key(boundary.key, b"text", ids[start:stop].tobytes())
                    size = stop - start
                    boundary = ChunkBoundary(key, *place, boundary.tokens + size, boundary.position + size)
                    yield boundary
            else:
                what = b"%s %dx%d" % (type(segment).__name__.encode(), segment.height, segment.width)
                draw = self._draw(done).numpy().tobytes() if isinstance(segment, VaeSegment) else b""
                key = _key(boundary.key, what, segment.pixels, draw)
                tokens = boundary.tokens + segment_tokens(segment, self.config)
                boundary = ChunkBoundary(key, done + 1, 0, tokens, boundary.position + 1)
                yield boundary

    def _groups(self, first: int) -> Iterator[tuple[int, list[Any]]]:
        """Segments whose chunks are cut together, from number ``first`` on: one, or texts beyond ``OWN_CHUNKS``."""
        done = first
        while done < len(self.segments):
            group = self.segments[done : done + 1]
            if done >= OWN_CHUNKS and isinstance(group[0], TextSegment):
                group = [*takewhile(lambda segment: isinstance(segment, TextSegment), self.segments[done:])]
            yield done, group
            done += len(group)

    def _draw(self, index: int) -> Tensor:
        """The posterior draw of segment ``index``, an image for generation."""
        return self.draws[sum(isinstance(before, VaeSegment) for before in self.segments[:index])]


def _key(*parts: bytes) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(len(part).to_bytes(8))
        digest.update(part)
    return digest.digest()


def build_branch_states(
    plans: Sequence[BranchPlan],
    kv_pool: KVCachePool,
    config: ModelConfig,
    draws: Sequence[Tensor] = (),
    adapter: LoraAdapter | None = None,
) -> list[BranchState]:
    """The branches that need a context, each with the earlier one that it shares most with as its parent."""
    states: list[BranchState] = []
    for plan in plans:
        if plan.same_as is not None:
            continue
        state = BranchState(plan.branch, list(plan.segments), config, KVSequence(kv_pool), draws, adapter)
        best = max(states, key=lambda other: _common(other.boundaries, state.boundaries), default=None)
        shared = _common(best.boundaries, state.boundaries) if best else 0
        if best and shared:
            state.parent, state.shared = best, shared
            best.children.append(state)
        states.append(state)
    return states


def _common(first: Sequence[ChunkBoundary], second: Sequence[ChunkBoundary]) -> int:
    """Length of the common beginning."""
    pairs = zip(first, second, strict=False)  # a key is a digest of all that came before
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
