"""Admission to the thinker: a request starts once the KV cache has room for its worst case."""

from __future__ import annotations

import time
from collections.abc import Sequence

from torch import Tensor

from bagel_triton.deploy.config import ThinkerConfig
from bagel_triton.engine.loop import Job
from bagel_triton.engine.thinker.branch_state import BranchState, build_branch_states
from bagel_triton.engine.thinker.prefill import posterior_noise
from bagel_triton.engine.thinker.run import ThinkerRun
from bagel_triton.kv.block_pool import PrefixCache
from bagel_triton.kv.connectors.base import Producer
from bagel_triton.model.config import ModelConfig
from bagel_triton.protocol.errors import InvalidRequest, Overloaded
from bagel_triton.protocol.messages import (
    Decoding,
    Plan,
    Segment,
    TextSegment,
    ThinkerOutput,
    VaeSegment,
    VitSegment,
)
from bagel_triton.telemetry.metrics import Metrics


class Admission:
    """Admits requests in order, each when its worst case fits beside those of the running ones.

    So a running request never finds the KV cache full. Cached prefixes reserve nothing: they
    are evicted when blocks are needed.
    """

    def __init__(
        self, model: ModelConfig, producer: Producer, prefixes: PrefixCache, config: ThinkerConfig, metrics: Metrics
    ) -> None:
        self._model, self._producer, self._kv_pool = model, producer, producer.pool
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
        branches = build_branch_states(plan.branches, kv_pool, self._model, self._draws(plan))
        needed = self._worst_case(branches, plan.decoding)
        if needed > kv_pool.blocks.count:
            tokens = sum(branch.total_tokens for branch in branches)
            raise InvalidRequest(
                f"the request is too long: {tokens} tokens of context and what may be decoded need {needed} KV blocks; "
                f"the KV cache has {kv_pool.blocks.count} of {kv_pool.geometry.block_tokens} tokens",
                "messages",
            )
        return ThinkerRun(job, branches, needed)

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
            decoded = kv_pool.blocks_for(past + 1 + decoding.max_new_tokens) - past // size + 1
            total += decoded * len(decoding.seeds)
            if decoding.purpose == "think":
                # The thought is encoded again and appended; each broken character takes three bytes.
                total += kv_pool.blocks_for(past + 2 + 3 * decoding.max_new_tokens) - past // size
        return total


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
