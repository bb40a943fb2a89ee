"""The autoregressive stage: every step prefills and decodes for all running requests together."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future

import torch
from torch import Tensor

from bagel_triton.deploy.config import ThinkerConfig
from bagel_triton.engine.loop import EngineLoop, Job
from bagel_triton.engine.thinker.admission import Admission
from bagel_triton.engine.thinker.branch_state import BranchState, Chunk
from bagel_triton.engine.thinker.detokenizer import IncrementalDetokenizer
from bagel_triton.engine.thinker.prefill import EncodingCache, Prefiller
from bagel_triton.engine.thinker.run import TextDecoder, ThinkerRun
from bagel_triton.kv.block_pool import KVCacheFull, KVSequence, PrefixCache
from bagel_triton.kv.connectors.base import SELFTEST_BLOCKS, SELFTEST_TTL_S, Producer, lend_pattern
from bagel_triton.model.autoencoder import Autoencoder
from bagel_triton.model.bagel import Bagel
from bagel_triton.model.config import LanguageConfig
from bagel_triton.model.cpu.thread_pool import ThreadPool
from bagel_triton.model.cuda.upload import wait_for_stream
from bagel_triton.model.tokenizer import Tokenizer
from bagel_triton.protocol.errors import Overloaded
from bagel_triton.protocol.intervals import WATCH_S
from bagel_triton.protocol.messages import (
    Branch,
    BranchKV,
    Decoding,
    DenoiseJob,
    FlowSettings,
    KVGeometry,
    KVHandle,
    Plan,
    TextSegment,
    ThinkerOutput,
)
from bagel_triton.telemetry.metrics import Metrics

ThinkerJob = Job[Plan, ThinkerOutput]


def kv_geometry(config: LanguageConfig, block_tokens: int, dtype: str) -> KVGeometry:
    """The KV layout of a checkpoint."""
    return KVGeometry(config.num_layers, config.num_kv_heads, config.head_dim, block_tokens, dtype)


class ThinkerEngine(EngineLoop[Plan, ThinkerOutput]):
    """Prefills contexts, decodes text, and lends contexts to the DiT; owns the KV cache, from one thread."""

    stage = "thinker"
    first_on_device = True

    def __init__(
        self,
        model: Bagel,
        autoencoder: Autoencoder,
        tokenizer: Tokenizer,
        producer: Producer,
        config: ThinkerConfig,
        metrics: Metrics | None = None,
    ) -> None:
        super().__init__(metrics, config.max_waiting, ThreadPool.of(model.device), model.device)
        self._model, self._tokenizer, self._producer = model, tokenizer, producer
        self._config = config
        markers = (tokenizer.vision_start, tokenizer.vision_end)
        encodings = EncodingCache(config.encoder_cache_mb * 10**6, self.metrics)
        graphs = not config.enforce_eager
        self._prefiller = Prefiller(model, autoencoder, producer.pool, encodings, markers, self._pool, graphs)
        self._prefixes = PrefixCache(producer.pool)
        self._admission = Admission(model.config, producer, self._prefixes, config, self.metrics)
        self._counted_at = 0.0
        self.gauge("kv_blocks", producer.pool.blocks.count)
        self._running: list[ThinkerRun] = []
        self.start()

    def lend_pattern(self) -> Future[KVHandle]:
        """A lease on a pattern for the connector's self-test; from any thread."""
        return self.call(self._lend_pattern)

    def _lend_pattern(self) -> KVHandle:
        if self._admission.room(self._running) < 2 * SELFTEST_BLOCKS:  # every other block stays a gap for a moment
            raise Overloaded("the KV cache has no room for a self-test beside the running requests")
        return lend_pattern(self._producer, min(SELFTEST_TTL_S, self._config.lease_ttl_s))

    @property
    def blocks_used(self) -> int:
        """Blocks that requests or leases hold; blocks of the prefix cache alone are not counted."""
        return self._producer.pool.blocks.used - self._prefixes.blocks

    # --- admission ---

    def _active(self) -> list[ThinkerJob]:
        return [active.job for active in self._running]

    def _admit(self, job: ThinkerJob) -> bool:
        return self._admission.admit(job, self._running)

    def _on_rejected(self, job: ThinkerJob) -> None:
        self._admission.abort(job)

    # --- one step: a token for each running text, then prefill within the budget ---

    def _step(self) -> None:
        budget = self._config.max_num_batched_tokens
        decoders = [(active, decoder) for active in self._running for decoder in active.running]
        chunks: list[Chunk] = [decoder.chunk for _, decoder in decoders]
        budget -= len(chunks)
        prefilled: list[BranchState] = []
        for active in self._running:
            for branch in active.branches:
                chunk = branch.next_chunk(budget, alone=not chunks)
                if chunk is not None:
                    chunks.append(chunk)
                    prefilled.append(branch)
                    budget -= chunk.tokens
        if chunks:
            logits, best = self._prefiller.append(chunks)
            for branch in prefilled:
                branch.advance()
                if self._config.enable_prefix_caching:
                    self._prefixes.keep(branch.keys, branch.context)
            self._decode(decoders, logits, best)
        for active in [active for active in self._running if active.prefilled and not active.running]:
            try:
                self._next_phase(active)
            except Exception as error:
                self._device_lost(error)
                self._fail(active.job, error)

    def _decode(self, decoders: Sequence[tuple[ThinkerRun, TextDecoder]], logits: Tensor, best: Tensor) -> None:
        best_ids = best.cpu().tolist()  # of all at once: each transfer from a GPU waits for the device
        if any(decoder.reads_scores for _, decoder in decoders):
            logits = logits.cpu()
        for (active, decoder), scores, token_id in zip(decoders, logits, best_ids, strict=True):
            if active.job.done.done():  # another of its texts has failed
                continue
            try:
                events = decoder.take(decoder.choose(scores, token_id), scores)
            except Exception as error:  # this request's failure, not that of the others in the step
                self._device_lost(error)
                self._fail(active.job, error)
                continue
            for event in events:
                active.job.progress(event)

    def _next_phase(self, active: ThinkerRun) -> None:
        """Decode after prefill; append the thought after thinking; then finish."""
        plan = active.job.task
        active.prefilled_at = active.prefilled_at or time.monotonic()
        if plan.decoding is not None and not active.decoders:
            self._begin_decoding(active, plan.decoding)
        elif plan.decoding is not None and plan.decoding.purpose == "think" and not active.decoded:
            self._append_thought(active)
        else:
            self._finish(active)

    def _begin_decoding(self, active: ThinkerRun, decoding: Decoding) -> None:
        gen = active.branches[0]
        prompt = [i for segment in gen.segments if isinstance(segment, TextSegment) for i in segment.token_ids]
        for index, seed in enumerate(decoding.seeds):
            decoder = TextDecoder(
                context=gen.context.fork(),
                decoding=decoding,
                tokenizer=self._tokenizer,
                detokenizer=IncrementalDetokenizer(index, decoding, self._tokenizer),
                generator=torch.Generator("cpu").manual_seed(seed),
                last_token=decoding.first_token,
                seen={*prompt, decoding.first_token},
            )
            active.decoders.append(decoder)

    def _append_thought(self, active: ThinkerRun) -> None:
        """Encode the thought again and append it to ``gen``, as the model was trained; its decoded KV is freed."""
        decoder = active.decoders[0]
        decoder.context.free()
        tokenizer = self._tokenizer
        thought = (tokenizer.start, *tokenizer.encode(decoder.detokenizer.text), tokenizer.end)
        gen = active.branches[0]
        gen.append(TextSegment(thought))
        self._admission.reuse(active, gen, 0)
        active.decoded = True

    def _finish(self, active: ThinkerRun) -> None:
        flow = active.job.task.flow
        job = None if flow is None else self._publish(active, flow)
        answers = tuple(decoder.detokenizer.answer() for decoder in active.decoders)
        active.record(self.metrics)
        self._free(active.job)
        active.job.finish(ThinkerOutput(answers, job), self.stage)

    def _publish(self, active: ThinkerRun, flow: FlowSettings) -> DenoiseJob:
        plan, ttl = active.job.task, self._config.lease_ttl_s
        wait_for_stream(self._model.device)  # a lease carries no ordering
        handles = []
        try:
            for branch in active.branches:
                handle = self._producer.leases.publish(plan.request_id, branch.name, branch.context, ttl)
                branch.context = KVSequence(self._producer.pool)  # the lease owns the blocks now
                handles.append(handle)
        except KVCacheFull as error:
            self._producer.leases.revoke(plan.request_id)
            self.metrics.count("thinker_refused")
            raise Overloaded(f"no KV lease is free: {error}") from error
        index: dict[Branch, int] = {handle.branch: number for number, handle in enumerate(handles)}
        branches = tuple(BranchKV(b.branch, index[b.same_as or b.branch]) for b in plan.branches)
        return DenoiseJob(plan.request_id, flow, tuple(handles), branches, plan.scheduling)

    # --- the end ---

    def _free(self, job: ThinkerJob) -> None:
        for active in [active for active in self._running if active.job is job]:
            self._running.remove(active)
            active.free()

    def _revoke_leases(self, request_id: str) -> None:
        self._producer.leases.revoke(request_id)

    def _housekeep(self) -> bool:
        leases = self._producer.leases
        leases.reclaim()
        self.gauge("kv_leases", len(leases))
        now = time.monotonic()
        if now - self._counted_at > WATCH_S or not self._running:
            self._counted_at = now
            self.gauge("kv_blocks_cached", self._prefixes.blocks)
            self.gauge("kv_blocks_used", self.blocks_used)
            self.gauge("kv_blocks_leased", leases.blocks)
        return len(leases) > 0

    def close(self) -> None:
        """Stop the thread, then end every lease and remove the KV cache."""
        super().close()
        self._prefixes.clear()
        self._producer.close()
