"""The autoregressive stage: prefills and decodes every request's contexts together, and lends them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future

import torch
from torch import Tensor

from bagel_triton.deploy.config import ThinkerConfig
from bagel_triton.engine.answer import GrowingAnswer
from bagel_triton.engine.prefill import Prefiller, posterior_noise
from bagel_triton.engine.sequence import Chunk, build_sequences
from bagel_triton.engine.sequence import Sequence as BranchSequence
from bagel_triton.engine.thinker_run import TextDecoder, ThinkerRun
from bagel_triton.engine.worker import Gauge, Job, Worker
from bagel_triton.errors import BagelError, InvalidRequest, Overloaded
from bagel_triton.kv import selftest
from bagel_triton.kv.arena import ArenaFull, Context
from bagel_triton.kv.connectors.base import Producer
from bagel_triton.messages import (
    Branch,
    BranchContext,
    ContextHandle,
    Decoding,
    DenoiseJob,
    FlowSettings,
    KVGeometry,
    Plan,
    TextSegment,
    Thoughts,
    VaeSegment,
)
from bagel_triton.model.autoencoder import Autoencoder
from bagel_triton.model.bagel import Bagel
from bagel_triton.model.config import LanguageConfig
from bagel_triton.model.tokenizer import Tokenizer

ThinkerJob = Job[Plan, Thoughts]


def kv_geometry(config: LanguageConfig, block_tokens: int, dtype: str) -> KVGeometry:
    """The KV layout of a checkpoint."""
    return KVGeometry(config.num_layers, config.num_kv_heads, config.head_dim, block_tokens, dtype)


class ThinkerEngine(Worker[Plan, Thoughts]):
    """Owns the transformer's understanding side and the KV arena, from one thread."""

    stage = "thinker"

    def __init__(
        self,
        model: Bagel,
        autoencoder: Autoencoder,
        tokenizer: Tokenizer,
        producer: Producer,
        config: ThinkerConfig,
        gauge: Gauge | None = None,
    ) -> None:
        super().__init__(gauge)
        self._model, self._tokenizer, self._producer = model, tokenizer, producer
        self._config = config
        markers = (tokenizer.vision_start, tokenizer.vision_end)
        self._prefiller = Prefiller(model, autoencoder, producer.arena, markers)
        self._running: list[ThinkerRun] = []
        self.start()

    def lend_pattern(self) -> Future[ContextHandle]:
        """A lease for the connector's self-test; from any thread."""
        return self.call(lambda: selftest.lend_pattern(self._producer, self._config.lease_ttl_s))

    # --- admission ---

    def _active(self) -> list[ThinkerJob]:
        return [active.job for active in self._running]

    def _admit(self, job: ThinkerJob) -> bool:
        plan, arena = job.task, self._producer.arena
        sequences = build_sequences(plan.branches, arena, self._model.config)
        needed = self._worst_case(sequences, plan.decoding)
        if needed > arena.blocks.count:
            tokens = sum(sequence.total_tokens for sequence in sequences)
            raise InvalidRequest(
                f"the request is too long: {tokens} tokens of context and what may be decoded need {needed} KV blocks; "
                f"the arena has {arena.blocks.count} of {arena.geometry.block_tokens} tokens",
                "messages",
            )
        promised = sum(active.blocks for active in self._running) + self._producer.leases.blocks
        if len(self._running) >= self._config.max_num_seqs or needed + promised > arena.blocks.count:
            waited = time.monotonic() - job.submitted_at
            if waited > self._config.admission_timeout_s:
                raise Overloaded(f"the thinker had no room for {waited:.0f} s: {needed} KV blocks wanted")
            return False
        self._running.append(ThinkerRun(job, sequences, self._noises(plan), needed))
        return True

    def _worst_case(self, sequences: Sequence[BranchSequence], decoding: Decoding | None) -> int:
        """Blocks that a request holds at most; a fork may copy one block."""
        arena = self._producer.arena
        size = arena.geometry.block_tokens
        total = sum(
            arena.blocks_for(sequence.total_tokens) - sequence.shared_tokens // size + bool(sequence.shared)
            for sequence in sequences
        )
        if decoding is not None:
            past = sequences[0].total_tokens
            decoded = arena.blocks_for(past + 1 + decoding.max_new_tokens) - past // size + 1
            total += decoded * len(decoding.seeds)
            if decoding.purpose == "think":
                # The thought is appended encoded afresh, each broken character as three bytes.
                total += arena.blocks_for(past + 2 + 3 * decoding.max_new_tokens) - past // size
        return total

    def _noises(self, plan: Plan) -> list[Tensor]:
        pictures = [segment for segment in plan.branches[0].segments if isinstance(segment, VaeSegment)]
        if not pictures or plan.flow is None:
            return []
        latent = self._model.config.latent
        return posterior_noise(pictures, latent.channels, latent.downsample, plan.flow.seed)

    # --- one step: a token for every running text, and prefill within the budget ---

    def _step(self) -> None:
        budget = self._config.max_num_batched_tokens
        chunks: list[Chunk] = []
        noises: list[Tensor | None] = []
        advances: list[tuple[BranchSequence, Chunk]] = []
        decoders = [decoder for active in self._running for decoder in active.running]
        for decoder in decoders:
            chunks.append(decoder.chunk)
            noises.append(None)
            budget -= 1
        for active in self._running:
            for sequence in active.sequences:
                chunk = sequence.next_chunk(budget, alone=not chunks)
                if chunk is not None:
                    chunks.append(chunk)
                    noises.append(active.noise_of(chunk))
                    advances.append((sequence, chunk))
                    budget -= chunk.tokens
        if chunks:
            logits = self._prefiller.append(chunks, noises)
            for sequence, chunk in advances:
                sequence.advance(chunk)
            self._decode(decoders, logits)
        for active in [active for active in self._running if active.prefilled and not active.running]:
            try:
                self._next_phase(active)
            except BagelError as error:
                self._drop(active.job)
                active.job.fail(error)

    def _decode(self, decoders: Sequence[TextDecoder], logits: Tensor) -> None:
        jobs = {id(decoder): active.job for active in self._running for decoder in active.decoders}
        for decoder, scores in zip(decoders, logits, strict=True):
            token = decoder.choose(scores)
            decoder.seen.append(token)
            for event in decoder.growing.push(token):
                jobs[id(decoder)].progress(event)

    def _next_phase(self, active: ThinkerRun) -> None:
        """After prefill: decode; after thinking: append the thought; then the answer."""
        plan = active.job.task
        if plan.decoding is not None and not active.decoders:
            self._begin_decoding(active, plan.decoding)
        elif plan.decoding is not None and plan.decoding.purpose == "think" and not active.decoded:
            self._append_thought(active)
        else:
            self._finish(active)

    def _begin_decoding(self, active: ThinkerRun, decoding: Decoding) -> None:
        gen = active.sequences[0]
        prompt = [i for segment in gen.segments if isinstance(segment, TextSegment) for i in segment.token_ids]
        for index, seed in enumerate(decoding.seeds):
            growing = GrowingAnswer(index, decoding, self._tokenizer)
            generator = torch.Generator("cpu").manual_seed(seed)
            seen = [*prompt, decoding.first_token]
            active.decoders.append(TextDecoder(gen.context.fork(), decoding, growing, generator, seen))

    def _append_thought(self, active: ThinkerRun) -> None:
        """The thought joins ``gen`` encoded afresh; its decoded keys and values do not."""
        decoder = active.decoders[0]
        decoder.context.free()
        tokenizer = self._tokenizer
        thought = (tokenizer.start, *tokenizer.encode(decoder.growing.text), tokenizer.end)
        active.sequences[0].segments.append(TextSegment(thought))
        active.decoded = True

    def _finish(self, active: ThinkerRun) -> None:
        flow = active.job.task.flow
        job = None if flow is None else self._publish(active, flow)
        answers = tuple(decoder.growing.answer() for decoder in active.decoders)
        self._drop(active.job)
        active.job.finish(Thoughts(answers, job), self.stage)

    def _publish(self, active: ThinkerRun, flow: FlowSettings) -> DenoiseJob:
        plan, ttl = active.job.task, self._config.lease_ttl_s
        if self._model.device.type == "cuda":
            torch.cuda.synchronize(self._model.device)  # a lease carries no ordering of its own
        handles = []
        try:
            for sequence in active.sequences:
                handle = self._producer.leases.publish(plan.request_id, sequence.branch, sequence.context, ttl)
                sequence.context = Context(self._producer.arena)  # the lease owns the blocks now
                handles.append(handle)
        except ArenaFull as error:
            self._producer.leases.withdraw(plan.request_id)
            raise Overloaded(f"no KV lease is free: {error}") from error
        index: dict[Branch, int] = {handle.branch: number for number, handle in enumerate(handles)}
        branches = tuple(BranchContext(b.branch, index[b.same_as or b.branch]) for b in plan.branches)
        return DenoiseJob(plan.request_id, flow, tuple(handles), branches)

    # --- the end ---

    def _drop(self, job: ThinkerJob) -> None:
        for active in [active for active in self._running if active.job is job]:
            self._running.remove(active)
            active.free()

    def _forget(self, request_id: str) -> None:
        self._producer.leases.withdraw(request_id)

    def _housekeep(self) -> bool:
        leases, blocks = self._producer.leases, self._producer.arena.blocks
        leases.reclaim()
        self.observe("kv_leases", len(leases))
        self.observe("kv_blocks_used", blocks.used)
        return len(leases) > 0

    def close(self) -> None:
        """Stop the thread, then end every lease and remove the arena."""
        super().close()
        self._producer.close()
