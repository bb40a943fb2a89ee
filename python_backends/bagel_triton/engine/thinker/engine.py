"""The autoregressive stage: every step prefills and decodes for all running requests together."""

from __future__ import annotations

import bisect
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING

import msgspec
import torch
from torch import Tensor

from bagel_triton.deploy.config import ThinkerConfig
from bagel_triton.engine.loop import EngineLoop, Job
from bagel_triton.engine.thinker.branch_state import BranchState, Chunk, build_branch_states
from bagel_triton.engine.thinker.detokenizer import IncrementalDetokenizer
from bagel_triton.engine.thinker.prefill import EncodingCache, Prefiller, posterior_noise
from bagel_triton.engine.thinker.run import TextDecoder, ThinkerRun
from bagel_triton.kv.block_pool import KVCacheFull, KVSequence, PrefixCache
from bagel_triton.kv.connectors.base import SELFTEST_BLOCKS, SELFTEST_TTL_S, Producer, lend_pattern
from bagel_triton.model.autoencoder import Autoencoder
from bagel_triton.model.bagel import Bagel
from bagel_triton.model.config import LanguageConfig, ModelConfig
from bagel_triton.model.cpu.thread_pool import ThreadPool
from bagel_triton.model.device import wait_for_stream
from bagel_triton.model.lora import LoraAdapter
from bagel_triton.model.sampling import Sampler
from bagel_triton.model.tokenizer import Tokenizer
from bagel_triton.protocol.errors import InvalidRequest, Overloaded, format_value
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
    Segment,
    TextSegment,
    ThinkerOutput,
    VaeSegment,
    VitSegment,
)
from bagel_triton.protocol.validation import check_adapter
from bagel_triton.telemetry.metrics import Metrics

if TYPE_CHECKING:
    from bagel_triton.parallel.group import RankGroup

ThinkerJob = Job[Plan, ThinkerOutput]


class Admission:
    """Admits requests in order, each when its worst case fits beside those of the running ones.

    So a running request never finds the KV cache full. Cached prefixes reserve nothing: they
    are evicted when blocks are needed.
    """

    def __init__(
        self,
        model: ModelConfig,
        producer: Producer,
        prefixes: PrefixCache,
        config: ThinkerConfig,
        metrics: Metrics,
        adapters: Mapping[str, LoraAdapter],
    ) -> None:
        self._model, self._producer, self._kv_pool = model, producer, producer.pool
        self._adapters = adapters
        self._prefixes, self._config, self._metrics = prefixes, config, metrics
        self._next: ThinkerRun | None = None  # of the first job in the queue, once it was prepared

    def admit(self, job: Job[Plan, ThinkerOutput], running: list[ThinkerRun]) -> bool:
        """Add ``job`` to ``running``; False if there is no room yet.

        Raises:
            InvalidRequest: it can never fit, or names tokens that the model does not have.
            Overloaded: it has waited for room too long.
        """
        if self._next is None or self._next.job is not job:
            self._next = self._prepare(job)
        run = self._next
        free = self.room(running)
        room = free - run.blocks
        if room < 0 and not run.waits:
            run.waits = True
            self._metrics.count("thinker_kv_waits")
        reasons = []
        if room < 0:
            reasons.append(f"KV blocks wanted: {run.blocks}, free: {free} of {self._kv_pool.blocks.count}")
        if len(running) >= (limit := self._config.max_num_seqs):
            reasons.append(f"it works on thinker.max_num_seqs={limit} requests")
        if reasons:
            waited = time.monotonic() - job.submitted_at
            if waited > self._config.admission_timeout_s:
                self._metrics.count("thinker_refused")
                raise Overloaded(f"the thinker had no room for {waited:.0f} s: {'; '.join(reasons)}")
            return False
        for branch in run.branches:
            room = self.reuse(run, branch, room)
        running.append(run)
        self._next = None
        return True

    def abort(self, job: Job[Plan, ThinkerOutput]) -> None:
        """Forget the run prepared for ``job``."""
        if self._next is not None and self._next.job is job:
            self._next = None

    def room(self, running: list[ThinkerRun]) -> int:
        """Blocks that no request and no lease may claim."""
        promised = sum(active.blocks for active in running) + self._producer.leases.blocks
        return self._kv_pool.blocks.count - promised

    def reuse(self, run: ThinkerRun, branch: BranchState, room: int) -> int:
        """Let ``branch`` continue from its longest cached prefix; the ``room`` left then, in blocks."""
        keys = [boundary.key for boundary in branch.boundaries]
        reached, shared = self._prefixes.longest(keys), branch.shared_tokens
        held = branch.context.tokens or shared
        self._metrics.count("thinker_prefix_query_tokens", branch.total_tokens - held)
        unshared = shared // self._kv_pool.geometry.block_tokens  # blocks its parent would have shared
        if reached and branch.boundaries[reached - 1].tokens > held and unshared <= room:
            self._metrics.count("thinker_prefix_hit_tokens", branch.boundaries[reached - 1].tokens - held)
            run.blocks += unshared
            room -= unshared
            branch.adopt(self._prefixes.take(keys[:reached]), reached)
        return room

    def _prepare(self, job: Job[Plan, ThinkerOutput]) -> ThinkerRun:
        """The run of ``job``, which holds nothing yet."""
        plan, kv_pool = job.task, self._kv_pool
        check_plan(plan, self._model)
        check_adapter(plan.lora, self._adapters)  # it may have been unloaded since the job came
        adapter = self._adapters[plan.lora] if plan.lora else None
        branches = build_branch_states(plan.branches, kv_pool, self._model, self._draws(plan), adapter)
        needed = self._worst_case(branches, plan.decoding)
        if needed > kv_pool.blocks.count:
            raise self._too_long(branches, plan.decoding)
        return ThinkerRun(job, branches, needed)

    def _too_long(self, branches: Sequence[BranchState], decoding: Decoding | None) -> InvalidRequest:
        """The error for a request that can never fit: what it may decode is too long, or its context already is."""
        kv_pool = self._kv_pool
        context = sum(branch.total_tokens for branch in branches)

        def fits(new_tokens: int, texts: int) -> bool:
            assert decoding is not None
            shorter = msgspec.structs.replace(decoding, max_new_tokens=new_tokens, seeds=decoding.seeds[:texts])
            return self._worst_case(branches, shorter) <= kv_pool.blocks.count

        if decoding is None or not fits(1, 1):
            allowed = f"at most {kv_pool.blocks.count * kv_pool.geometry.block_tokens} tokens, what is decoded included"
            too_long = (
                f"messages={format_value(f'{context} tokens of context')} is not allowed: the request is too long"
            )
            return InvalidRequest(f"{too_long}; allowed: {allowed}", "messages")
        new_tokens, texts = decoding.max_new_tokens, len(decoding.seeds)
        if fits(new_tokens, 1):
            name, value, most = "n", texts, _largest(lambda n: fits(new_tokens, n), texts)
            beside = f"{context} tokens of context and {new_tokens} for each result"
        else:
            name = "max_think_tokens" if decoding.purpose == "think" else "max_tokens"
            results = texts if fits(1, texts) else 1
            value, most = new_tokens, _largest(lambda tokens: fits(tokens, results), new_tokens)
            beside = f"{context} tokens of context" + (f" and {results} results" if results > 1 else "")
        too_long = f"{name}={value} is not allowed: the request is too long, with {beside}"
        return InvalidRequest(f"{too_long}; allowed: at most {most}", name)

    def _draws(self, plan: Plan) -> list[Tensor]:
        """The posterior draws of the request's images for generation."""
        images = [segment for segment in plan.branches[0].segments if isinstance(segment, VaeSegment)]
        if not images or plan.flow is None:
            return []
        latent = self._model.latent
        return posterior_noise(images, latent.channels, latent.downsample, plan.flow.seed)

    def _worst_case(self, branches: Sequence[BranchState], decoding: Decoding | None) -> int:
        """Blocks that a request holds at most; a fork may copy one block."""
        kv_pool = self._kv_pool
        size = kv_pool.geometry.block_tokens
        total = sum(
            kv_pool.blocks_for(branch.total_tokens) - branch.shared_tokens // size + bool(branch.shared)
            for branch in branches
        )
        if decoding is not None:
            past = branches[0].total_tokens
            total += decoded_blocks(past, decoding.max_new_tokens, size) * len(decoding.seeds)
            if decoding.purpose == "think":
                # The thought is encoded again and appended; each broken character takes three bytes.
                total += kv_pool.blocks_for(past + 2 + 3 * decoding.max_new_tokens) - past // size
        return total


def _largest(fits: Callable[[int], bool], limit: int) -> int:
    """The largest number below ``limit`` that fits, as all smaller ones do; 1 does."""
    return bisect.bisect_left(range(1, limit), True, key=lambda number: not fits(number))


def decoded_blocks(past: int, new: int, block_tokens: int) -> int:
    """Blocks that one text of ``new`` tokens holds at most beside those of its context of ``past`` tokens."""
    return -(-(past + 1 + new) // block_tokens) - past // block_tokens + 1


def check_plan(plan: Plan, config: ModelConfig) -> None:
    """Refuse tokens and images that this checkpoint has no place for, before they share a step with others.

    Raises:
        InvalidRequest: names the value and what is allowed.
    """
    if plan.decoding is not None:
        _check_token(plan.decoding.first_token, config)
    expected = _sizes(plan.branches[0].segments)
    if expected and plan.flow is None:
        raise InvalidRequest.value("plan", "an image for generation", "one only if flow says what to generate")
    for branch in plan.branches:
        for segment in branch.segments:
            if isinstance(segment, TextSegment):
                _check_token(max(segment.token_ids), config)
            else:
                _check_image(segment, config)
        sizes = _sizes(branch.segments)
        if sizes != expected[: len(sizes)]:  # draws belong to images by number
            raise InvalidRequest.value("plan", f"images of {sizes} in {branch.branch}", f"those of gen, {expected}")


def _sizes(segments: Sequence[Segment]) -> list[tuple[int, int]]:
    return [(segment.height, segment.width) for segment in segments if isinstance(segment, VaeSegment)]


def _check_token(token_id: int, config: ModelConfig) -> None:
    size = config.language.vocab_size
    if token_id >= size:
        raise InvalidRequest.value("plan", token_id, f"token ids below {size}")


def _check_image(segment: VitSegment | VaeSegment, config: ModelConfig) -> None:
    generated = isinstance(segment, VaeSegment)
    patch = config.latent.stride if generated else config.vit.patch_size
    longest = config.latent.max_side if generated else config.vit.max_side
    for side in (segment.height, segment.width):
        if side % patch or side > longest:
            what = f"{type(segment).__name__} of {segment.height}x{segment.width}"
            raise InvalidRequest.value("plan", what, f"sides that are multiples of {patch} up to {longest}")


def kv_geometry(config: LanguageConfig, block_tokens: int, dtype: str) -> KVGeometry:
    """The KV layout of a checkpoint."""
    return KVGeometry(config.num_layers, config.num_kv_heads, config.head_dim, block_tokens, dtype)


class ThinkerEngine(EngineLoop[Plan, ThinkerOutput]):
    """Prefills contexts, decodes text, and lends contexts to the DiT; owns the KV cache, from one thread.

    Without an ``autoencoder`` it takes no request for an image. ``adapters`` are those that requests may name.
    ``ranks`` compute its forwards, if there are any; they are closed with it.
    """

    stage = "thinker"
    first_on_device = True

    def __init__(
        self,
        model: Bagel,
        autoencoder: Autoencoder | None,
        tokenizer: Tokenizer,
        producer: Producer,
        config: ThinkerConfig,
        metrics: Metrics | None = None,
        adapters: Mapping[str, LoraAdapter] | None = None,
        ranks: RankGroup | None = None,
    ) -> None:
        super().__init__(metrics, config.max_waiting, ThreadPool.of(model.device), model.device)
        self._model, self._tokenizer, self._producer = model, tokenizer, producer
        self._config, self._draws_images = config, autoencoder is not None
        self._adapters: Mapping[str, LoraAdapter] = {} if adapters is None else adapters
        vision_tokens = (tokenizer.vision_start, tokenizer.vision_end)
        encodings = EncodingCache(config.encoder_cache_mb * 10**6, self.metrics)
        self._ranks = ranks
        if ranks is not None:
            ranks.join(self.end)
            ranks.attach(producer.pool)
        graphs, forward = not config.enforce_eager, None if ranks is None else ranks.forward
        self._prefiller = Prefiller(
            model, autoencoder, producer.pool, encodings, vision_tokens, self._pool, graphs, forward
        )
        self._sampler = Sampler(model.device)
        self._prefixes = PrefixCache(producer.pool)
        self._admission = Admission(model.config, producer, self._prefixes, config, self.metrics, self._adapters)
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

    def _check(self, task: Plan) -> None:
        check_adapter(task.lora, self._adapters)
        if task.flow is not None and not self._draws_images:
            raise InvalidRequest.value("plan", "an image", "a text: this server has load=understanding")

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
        choices = self._sampler(logits, best, [decoder.state for _, decoder in decoders])
        for (active, decoder), choice in zip(decoders, choices, strict=True):
            if active.job.done.done():  # another of its texts has failed
                continue
            try:
                events = decoder.take(choice)
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
                adapter=gen.adapter,
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
        if self._ranks is not None:
            self._ranks.collect({block for branch in active.branches for block in branch.context.blocks})
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
        return DenoiseJob(plan.request_id, flow, tuple(handles), branches, plan.scheduling, plan.lora)

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
        if self._ranks is not None:
            self._ranks.close()
        self._prefixes.clear()
        self._producer.close()
