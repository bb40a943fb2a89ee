"""One request in the thinker: its branches, the texts it decodes, and what it may hold."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bagel_triton.engine.loop import Job
from bagel_triton.engine.thinker.branch_state import BranchState, TextChunk
from bagel_triton.engine.thinker.detokenizer import IncrementalDetokenizer
from bagel_triton.kv.block_pool import KVSequence
from bagel_triton.model.sampling import next_token, penalised
from bagel_triton.protocol.events import TextEvent
from bagel_triton.protocol.messages import Decoding, Plan, ThinkerOutput
from bagel_triton.telemetry.metrics import Metrics


@dataclass(eq=False)
class TextDecoder:
    """One text being decoded on a context of its own."""

    context: KVSequence
    decoding: Decoding
    growing: IncrementalDetokenizer
    generator: torch.Generator
    seen: list[int]  # prompt and text so far, for the repetition penalty
    first_at: float = 0.0  # monotonic seconds of the first token and of the last
    last_at: float = 0.0

    @property
    def chunk(self) -> TextChunk:
        """The last token, to be appended and scored."""
        return TextChunk(self.context, (self.seen[-1],), scored=True)

    def take(self, token_id: int) -> list[TextEvent]:
        """Add the next token; the text that became certain."""
        self.seen.append(token_id)
        self.last_at = time.monotonic()
        self.first_at = self.first_at or self.last_at
        return list(self.growing.push(token_id))

    def choose(self, logits: Tensor, best: int) -> int:
        """The next token for ``logits`` [vocabulary], of which number ``best`` is the largest."""
        how = self.decoding
        if how.temperature == 0.0 and how.repetition_penalty == 1.0:
            return best
        if how.repetition_penalty != 1.0:
            seen = torch.tensor(sorted(set(self.seen)), device=logits.device)
            logits = penalised(logits, seen, how.repetition_penalty)
        return next_token(logits, how.temperature, how.top_k, how.top_p, self.generator)


@dataclass(eq=False)
class ThinkerRun:
    """One request under way; ``blocks`` is the most that it can come to hold."""

    job: Job[Plan, ThinkerOutput]
    sequences: list[BranchState]
    blocks: int
    decoders: list[TextDecoder] = field(default_factory=list)
    decoded: bool = False
    waits: bool = False  # it found the arena full
    prefilled_at: float = 0.0

    @property
    def prefilled(self) -> bool:
        """Whether every branch's context is complete."""
        return all(sequence.complete for sequence in self.sequences)

    @property
    def running(self) -> list[TextDecoder]:
        """Texts that have not ended."""
        return [decoder for decoder in self.decoders if decoder.growing.finish_reason is None]

    def tell(self, metrics: Metrics) -> None:
        """Measurements of a request that is through."""
        job = self.job
        metrics.count("prompt_tokens", job.task.usage.prompt_tokens)
        if job.started_at is not None and self.prefilled_at:
            metrics.observe("thinker_prefill_seconds", self.prefilled_at - job.started_at)
        for decoder in self.decoders:
            tokens = len(decoder.growing.tokens)
            metrics.count("generated_tokens", tokens)
            metrics.observe("time_to_first_token_seconds", decoder.first_at - job.submitted_at)
            if tokens > 1:
                metrics.observe("time_per_output_token_seconds", (decoder.last_at - decoder.first_at) / (tokens - 1))

    def free(self) -> None:
        """Give every context back."""
        for context in [held.context for held in self.sequences] + [held.context for held in self.decoders]:
            context.free()
