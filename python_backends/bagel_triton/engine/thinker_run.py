"""One request in the thinker: its branches, the texts it decodes, and what it may hold."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from bagel_triton.engine.answer import GrowingAnswer
from bagel_triton.engine.sequence import Chunk, PictureChunk, Sequence, TextChunk
from bagel_triton.engine.worker import Job
from bagel_triton.kv.arena import Context
from bagel_triton.messages import Decoding, Plan, Thoughts, VaeSegment
from bagel_triton.model.sampling import next_token, penalised


@dataclass(eq=False)
class TextDecoder:
    """One text being decoded on a context of its own."""

    context: Context
    decoding: Decoding
    growing: GrowingAnswer
    generator: torch.Generator
    seen: list[int]  # prompt and text so far, for the repetition penalty

    @property
    def chunk(self) -> TextChunk:
        """The last token, to be appended and scored."""
        return TextChunk(self.context, (self.seen[-1],), scored=True)

    def choose(self, logits: Tensor) -> int:
        """The next token for ``logits`` [vocabulary]."""
        how = self.decoding
        if how.repetition_penalty != 1.0:
            seen = torch.tensor(sorted(set(self.seen)), device=logits.device)
            logits = penalised(logits, seen, how.repetition_penalty)
        return next_token(logits, how.temperature, how.top_k, how.top_p, self.generator)


@dataclass(eq=False)
class ThinkerRun:
    """One request under way; ``blocks`` is the most that it can come to hold."""

    job: Job[Plan, Thoughts]
    sequences: list[Sequence]
    noises: list[Tensor]
    blocks: int
    decoders: list[TextDecoder] = field(default_factory=list)
    decoded: bool = False

    @property
    def prefilled(self) -> bool:
        """Whether every branch's context is complete."""
        return all(sequence.complete for sequence in self.sequences)

    @property
    def running(self) -> list[TextDecoder]:
        """Texts that have not ended."""
        return [decoder for decoder in self.decoders if decoder.growing.finish_reason is None]

    def noise_of(self, chunk: Chunk) -> Tensor | None:
        """The posterior draw that ``chunk`` needs, if it needs one."""
        picture = isinstance(chunk, PictureChunk) and isinstance(chunk.segment, VaeSegment)
        return self.noises[chunk.noise_index] if picture else None  # type: ignore[union-attr]

    def free(self) -> None:
        """Give every context back."""
        for context in [held.context for held in self.sequences] + [held.context for held in self.decoders]:
            context.free()
