"""The autoregressive stage: prefills every branch of every request, packed, and lends the KV."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from bagel_triton.deploy.config import ThinkerConfig
from bagel_triton.engine.worker import Job, Worker
from bagel_triton.errors import InvalidRequest, Overloaded
from bagel_triton.kv.arena import ArenaFull, Context
from bagel_triton.kv.connectors.base import Producer
from bagel_triton.kv.store import PagedStep
from bagel_triton.messages import Branch, BranchContext, BranchPlan, DenoiseJob, KVGeometry, Plan
from bagel_triton.model.attention import Span
from bagel_triton.model.bagel import Bagel
from bagel_triton.model.config import LanguageConfig
from bagel_triton.model.mot import Pack, rotary_tables

ThinkerJob = Job[Plan, DenoiseJob]


def kv_geometry(config: LanguageConfig, block_tokens: int, dtype: str) -> KVGeometry:
    """The KV layout of a checkpoint."""
    return KVGeometry(config.num_layers, config.num_kv_heads, config.head_dim, block_tokens, dtype)


@dataclass
class _Prefill:
    """One branch's context and the tokens it still lacks."""

    branch: Branch
    context: Context
    pending: list[list[int]] = field(default_factory=list)  # a list of token ids per segment

    def take(self, budget: int) -> list[int]:
        """Up to ``budget`` tokens of the next segment: causal, so it may be cut anywhere."""
        tokens = self.pending[0][:budget]
        self.pending[0] = self.pending[0][budget:]
        if not self.pending[0]:
            self.pending.pop(0)
        return tokens


@dataclass
class _Active:
    job: ThinkerJob
    prefills: list[_Prefill]

    @property
    def through(self) -> bool:
        return not any(prefill.pending for prefill in self.prefills)


class ThinkerEngine(Worker[Plan, DenoiseJob]):
    """Owns the transformer's understanding side and the KV arena, from one thread."""

    stage = "thinker"

    def __init__(
        self,
        model: Bagel,
        producer: Producer,
        config: ThinkerConfig,
        gauge: Callable[[str, float], None] = lambda name, value: None,
    ) -> None:
        super().__init__()
        self._model, self._producer, self._config, self._gauge = model, producer, config, gauge
        self._running: list[_Active] = []
        self._gauged: dict[str, float] = {}
        self.start()

    def _active(self) -> list[ThinkerJob]:
        return [active.job for active in self._running]

    def _admit(self, job: ThinkerJob) -> bool:
        own = [branch for branch in job.task.branches if branch.same_as is None]
        arena = self._producer.arena
        needed = sum(arena.blocks_for(_tokens(branch)) for branch in own)
        if needed > arena.blocks.count:
            tokens = sum(_tokens(branch) for branch in own)
            raise InvalidRequest(f"prompt is too long: {tokens} tokens; the KV arena holds {arena.capacity}", "prompt")
        promised = sum(self._missing_blocks(prefill) for active in self._running for prefill in active.prefills)
        if len(self._running) >= self._config.max_num_seqs or needed + promised > arena.blocks.free:
            waited = time.monotonic() - job.submitted_at
            if waited > self._config.admission_timeout_s:
                raise Overloaded(f"the thinker had no room for {waited:.0f} s: {needed} KV blocks wanted")
            return False
        prefills = [
            _Prefill(branch.branch, Context(arena), [list(segment.token_ids) for segment in branch.segments])
            for branch in own
        ]
        self._running.append(_Active(job, prefills))
        return True

    def _missing_blocks(self, prefill: _Prefill) -> int:
        total = prefill.context.tokens + sum(len(segment) for segment in prefill.pending)
        return self._producer.arena.blocks_for(total) - len(prefill.context.blocks)

    def _step(self) -> None:
        budget = self._config.max_num_batched_tokens
        chunks: list[tuple[_Prefill, list[int]]] = []
        for active in self._running:
            for prefill in active.prefills:
                if prefill.pending and budget > 0:
                    chunks.append((prefill, prefill.take(budget)))
                    budget -= len(chunks[-1][1])
        if chunks:
            self._forward(chunks)
        for active in [active for active in self._running if active.through]:
            self._publish(active)

    @torch.inference_mode()
    def _forward(self, chunks: Sequence[tuple[_Prefill, list[int]]]) -> None:
        """One packed causal forward; only its keys and values are kept."""
        arena, device = self._producer.arena, self._model.device
        token_ids: list[int] = []
        positions: list[int] = []
        slots, spans = [], []
        for sequence, (prefill, tokens) in enumerate(chunks):
            context, start = prefill.context, len(token_ids)
            slots.append(context.extend(len(tokens)))
            positions.extend(range(context.next_position, context.next_position + len(tokens)))
            context.next_position += len(tokens)
            token_ids.extend(tokens)
            spans.append(Span(start, len(token_ids), sequence, causal=True))
        reads = [arena.read_slots(prefill.context) for prefill, _ in chunks]
        kv = PagedStep(arena.store, torch.cat(slots), reads)
        cos, sin = rotary_tables(torch.tensor(positions, device=device), self._model.config.language, self._model.dtype)
        embeddings = self._model.embed_text(torch.tensor(token_ids, device=device))
        self._model.language_model.model(embeddings, Pack(0, cos, sin, spans, kv))

    def _publish(self, active: _Active) -> None:
        job, plan, ttl = active.job, active.job.task, self._config.lease_ttl_s
        if self._model.device.type == "cuda":
            torch.cuda.synchronize(self._model.device)  # a lease carries no ordering of its own
        try:
            handles = [
                self._producer.leases.publish(plan.request_id, prefill.branch, prefill.context, ttl)
                for prefill in active.prefills
            ]
        except ArenaFull as error:
            raise Overloaded(f"no KV lease is free: {error}") from error
        self._running.remove(active)
        index = {handle.branch: number for number, handle in enumerate(handles)}
        branches = tuple(BranchContext(b.branch, index[b.same_as or b.branch]) for b in plan.branches)
        job.finish(DenoiseJob(plan.request_id, plan.flow, tuple(handles), branches), self.stage)

    def _drop(self, job: ThinkerJob) -> None:
        for active in [active for active in self._running if active.job is job]:
            self._running.remove(active)
            for prefill in active.prefills:
                prefill.context.free()

    def _forget(self, request_id: str) -> None:
        self._producer.leases.withdraw(request_id)

    def _housekeep(self) -> bool:
        leases, blocks = self._producer.leases, self._producer.arena.blocks
        leases.reclaim()
        for name, value in (("kv_leases", len(leases)), ("kv_blocks_used", blocks.used)):
            if self._gauged.get(name) != value:
                self._gauged[name] = value
                self._gauge(name, value)
        return len(leases) > 0

    def close(self) -> None:
        """Stop the thread, then end every lease and remove the arena."""
        super().close()
        self._producer.close()


def _tokens(branch: BranchPlan) -> int:
    return sum(len(segment.token_ids) for segment in branch.segments)
