"""A branch's context under construction: what it still lacks, and who forks from it."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass, field

from bagel_triton.kv.arena import Context, KVArena
from bagel_triton.messages import Branch, BranchPlan, Segment, TextSegment, VaeSegment, VitSegment
from bagel_triton.model.config import ModelConfig

TEXT_CHUNK = 512
MARKERS = 2  # <|vision_start|> and <|vision_end|> around a picture's tokens


@dataclass(frozen=True)
class TextChunk:
    """Tokens to append causally; with ``scored`` the last one's logits are wanted."""

    context: Context
    token_ids: tuple[int, ...]
    scored: bool = False

    @property
    def tokens(self) -> int:
        """Tokens this chunk appends."""
        return len(self.token_ids)


@dataclass(frozen=True)
class PictureChunk:
    """A whole picture to append as one bidirectional block, markers included."""

    context: Context
    segment: VitSegment | VaeSegment
    tokens: int
    noise_index: int = 0  # which of the request's posterior draws a VaeSegment uses


Chunk = TextChunk | PictureChunk


def segment_tokens(segment: Segment, config: ModelConfig) -> int:
    """Tokens that ``segment`` adds to a context."""
    if isinstance(segment, TextSegment):
        return len(segment.token_ids)
    stride = config.latent.stride if isinstance(segment, VaeSegment) else config.vit.patch_size
    return (segment.height // stride) * (segment.width // stride) + MARKERS


@dataclass(eq=False)
class Sequence:
    """One branch of one request, from its first token to its last.

    A branch that begins like an earlier one waits for that one to get there, then forks
    its context: shared prefixes are prefilled once.
    """

    branch: Branch
    segments: list[Segment]
    config: ModelConfig
    context: Context
    parent: Sequence | None = None
    shared: int = 0  # leading segments taken from the parent
    done: int = 0  # segments that are in the context
    offset: int = 0  # tokens of the next segment that are in the context
    children: list[Sequence] = field(default_factory=list)

    @property
    def waiting(self) -> bool:
        """Whether it still waits to be forked."""
        return self.parent is not None

    @property
    def complete(self) -> bool:
        """Whether every segment is in the context."""
        return not self.waiting and self.done == len(self.segments)

    @property
    def total_tokens(self) -> int:
        """Tokens of the complete context."""
        return sum(segment_tokens(segment, self.config) for segment in self.segments)

    @property
    def shared_tokens(self) -> int:
        """Tokens taken from the parent."""
        return sum(segment_tokens(segment, self.config) for segment in self.segments[: self.shared])

    def next_chunk(self, budget: int, alone: bool) -> Chunk | None:
        """What to append next within ``budget`` tokens, if anything.

        A picture is one block; text is cut every ``TEXT_CHUNK`` tokens and nowhere else, so
        that a context's numbers do not depend on who shares the step. One chunk that is
        ``alone`` in the step may exceed the budget.
        """
        if self.waiting or self.complete:
            return None
        segment = self.segments[self.done]
        if isinstance(segment, TextSegment):
            text = TextChunk(self.context, segment.token_ids[self.offset : self.offset + TEXT_CHUNK])
            return text if alone or text.tokens <= budget else None
        tokens = segment_tokens(segment, self.config)
        if tokens > budget and not alone:
            return None
        earlier = sum(isinstance(before, VaeSegment) for before in self.segments[: self.done])
        return PictureChunk(self.context, segment, tokens, noise_index=earlier)

    def advance(self, chunk: Chunk) -> None:
        """``chunk`` is in the context now; branches that were waiting for it fork."""
        self.offset += chunk.tokens
        if self.offset == segment_tokens(self.segments[self.done], self.config):
            self.done, self.offset = self.done + 1, 0
        self.fork_children()

    def fork_children(self) -> None:
        """Fork the branches that share exactly what is done so far."""
        for child in [child for child in self.children if child.shared == self.done and not self.offset]:
            child.context, child.parent, child.done = self.context.fork(), None, child.shared
            self.children.remove(child)
            child.fork_children()


def build_sequences(branches: Items[BranchPlan], arena: KVArena, config: ModelConfig) -> list[Sequence]:
    """The branches that need a context, each tied to the earlier one it shares most with."""
    sequences: list[Sequence] = []
    for plan in branches:
        if plan.same_as is not None:
            continue
        sequence = Sequence(plan.branch, list(plan.segments), config, Context(arena))
        best = max(sequences, key=lambda other: _common(other.segments, sequence.segments), default=None)
        shared = _common(best.segments, sequence.segments) if best else 0
        if best and shared:
            sequence.parent, sequence.shared = best, shared
            best.children.append(sequence)
        sequences.append(sequence)
    return sequences


def _common(first: Items[Segment], second: Items[Segment]) -> int:
    length = 0
    while length < min(len(first), len(second)) and first[length] == second[length]:
        length += 1
    return length
