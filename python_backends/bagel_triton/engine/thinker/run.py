"""One request in the thinker: its branches and the texts it decodes."""

from __future__ import annotations

import math
import time
from collections import Counter
from dataclasses import dataclass, field

import msgspec
import torch

from bagel_triton.engine.loop import Job
from bagel_triton.engine.thinker.branch_state import BranchState, TextChunk
from bagel_triton.engine.thinker.detokenizer import IncrementalDetokenizer
from bagel_triton.kv.block_pool import KVSequence
from bagel_triton.model.lora import LoraAdapter
from bagel_triton.model.sampling import Choice, TextState
from bagel_triton.model.tokenizer import Tokenizer
from bagel_triton.protocol.events import TextEvent
from bagel_triton.protocol.messages import Decoding, Plan, ThinkerOutput, TokenLogprob
from bagel_triton.telemetry.metrics import Metrics


@dataclass(eq=False)
class TextDecoder:
    """One text being decoded, on a context of its own."""

    context: KVSequence
    decoding: Decoding
    tokenizer: Tokenizer
    detokenizer: IncrementalDetokenizer
    generator: torch.Generator
    last_token: int
    seen: set[int]  # tokens of prompt and text so far, for the repetition penalty
    adapter: LoraAdapter | None = None
    counts: Counter[int] = field(default_factory=Counter)  # of the text so far alone
    first_at: float = 0.0  # monotonic seconds of the first token and of the last
    last_at: float = 0.0

    @property
    def chunk(self) -> TextChunk:
        """The last token, to be appended and scored."""
        return TextChunk(self.context, (self.last_token,), scored=True, adapter=self.adapter)

    @property
    def state(self) -> TextState:
        """The settings and the state that choose the next token, beside the scores."""
        how = self.decoding
        if len(self.detokenizer.tokens) < how.min_new_tokens:  # it must not end yet
            how = msgspec.structs.replace(how, logit_bias={**how.logit_bias, self.tokenizer.end: -math.inf})
        return TextState(how, self.generator, self.seen, self.counts)

    def take(self, choice: Choice) -> list[TextEvent]:
        """Add the chosen token; the text that became certain.

        Raises:
            ArithmeticError: there is none.
        """
        token_id = choice.token_id
        if token_id < 0:
            raise ArithmeticError("the model's scores are not finite, so no token can be drawn")
        self.last_token = token_id
        self.seen.add(token_id)
        self.counts[token_id] += 1
        self.last_at = time.monotonic()
        self.first_at = self.first_at or self.last_at
        return list(self.detokenizer.push(token_id, self._logprob(choice)))

    def _logprob(self, choice: Choice) -> TokenLogprob | None:
        """The requested log-probabilities of a token."""
        if self.decoding.top_logprobs is None or choice.token_id == self.tokenizer.end:
            return None
        alternatives = tuple(self._described(token, value) for token, value in choice.top)
        return msgspec.structs.replace(self._described(choice.token_id, choice.logprob), top=alternatives)

    def _described(self, token_id: int, logprob: float) -> TokenLogprob:
        data = self.tokenizer.token_bytes(token_id)
        return TokenLogprob(data.decode(errors="replace"), tuple(data), logprob)


@dataclass(eq=False)
class ThinkerRun:
    """One running request; ``blocks`` is the most that it can hold."""

    job: Job[Plan, ThinkerOutput]
    branches: list[BranchState]
    blocks: int
    decoders: list[TextDecoder] = field(default_factory=list)
    decoded: bool = False
    waits: bool = False  # it has waited for KV blocks
    prefilled_at: float = 0.0

    @property
    def prefilled(self) -> bool:
        """Whether every branch's context is complete."""
        return all(branch.complete for branch in self.branches)

    @property
    def running(self) -> list[TextDecoder]:
        """Texts that have not ended."""
        return [decoder for decoder in self.decoders if decoder.detokenizer.finish_reason is None]

    def record(self, metrics: Metrics) -> None:
        """Record the measurements of a request that is done."""
        job = self.job
        metrics.count("prompt_tokens", job.task.usage.prompt_tokens)
        if job.started_at is not None and self.prefilled_at:
            metrics.observe("thinker_prefill_seconds", self.prefilled_at - job.started_at)
        for decoder in self.decoders:
            tokens = len(decoder.detokenizer.tokens)
            metrics.count("generated_tokens", tokens)
            metrics.observe("time_to_first_token_seconds", decoder.first_at - job.submitted_at)
            if tokens > 1:
                metrics.observe("time_per_output_token_seconds", (decoder.last_at - decoder.first_at) / (tokens - 1))

    def free(self) -> None:
        """Free every context."""
        for context in [held.context for held in self.branches] + [held.context for held in self.decoders]:
            context.free()
