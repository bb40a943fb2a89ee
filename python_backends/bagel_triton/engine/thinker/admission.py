"""What the thinker promises a request before it starts: room for all that it may come to hold."""

from __future__ import annotations

import time
from collections.abc import Sequence

from torch import Tensor

from bagel_triton.deploy.config import ThinkerConfig
from bagel_triton.engine.loop import Job
from bagel_triton.engine.thinker.branch_state import BranchState, build_branch_states
from bagel_triton.engine.thinker.prefill import posterior_noise
from bagel_triton.engine.thinker.run import ThinkerRun
from bagel_triton.kv.connectors.base import Producer
from bagel_triton.kv.prefix_cache import PrefixCache
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
    """Lets a request in when its worst case fits beside what is promised already.

    So a running request never meets a full KV cache. What is kept for later requests is not
    promised to anyone: it goes when blocks are needed.
    """

    def __init__(
        self, model: ModelConfig, producer: Producer, prefixes: PrefixCache, config: ThinkerConfig, metrics: Metrics
    ) -> None:
        self._model, self._producer, self._kv_pool = model, producer, producer.pool
        self._prefixes, self._config, self._metrics = prefixes, config, metrics
        self._next: ThinkerRun | None = None  # the first in line, once it was looked at

    def admit(self, job: Job[Plan, ThinkerOutput], running: list[ThinkerRun]) -> bool:
        """Add ``job`` to ``running``; False where there is no room yet.

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
        for sequence in run.sequences:
            room = self.reuse(run, sequence, room)
        running.append(run)
        self._next = None
        return True

    def abort(self, job: Job[Plan, ThinkerOutput]) -> None:
        """Drop what was prepared for ``job``, which waits no more."""
        if self._next is not None and self._next.job is job:
            self._next = None

    def room(self, running: list[ThinkerRun]) -> int:
        """Blocks that are promised to nobody."""
        promised = sum(active.blocks for active in running) + self._producer.leases.blocks
        return self._kv_pool.blocks.count - promised

    def reuse(self, run: ThinkerRun, sequence: BranchState, room: int) -> int:
        """Let ``sequence`` go on from the longest context that is kept; the ``room`` left then, in blocks."""
        keys = [boundary.key for boundary in sequence.boundaries]
        reached, shared = self._prefixes.longest(keys), sequence.shared_tokens
        held = sequence.context.tokens or shared
        self._metrics.count("thinker_prefix_query_tokens", sequence.total_tokens - held)
        unshared = shared // self._kv_pool.geometry.block_tokens  # blocks that its parent would have lent it
        if reached and sequence.boundaries[reached - 1].tokens > held and unshared <= room:
            self._metrics.count("thinker_prefix_hit_tokens", sequence.boundaries[reached - 1].tokens - held)
            run.blocks += unshared
            room -= unshared
            sequence.adopt(self._prefixes.take(keys[:reached]), reached)
        return room

    def _prepare(self, job: Job[Plan, ThinkerOutput]) -> ThinkerRun:
        """The run of ``job``, which holds nothing yet."""
        plan, kv_pool = job.task, self._kv_pool
        check_plan(plan, self._model)
        sequences = build_branch_states(plan.branches, kv_pool, self._model, self._draws(plan))
        needed = self._worst_case(sequences, plan.decoding)
        if needed > kv_pool.blocks.count:
            tokens = sum(sequence.total_tokens for sequence in sequences)
            raise InvalidRequest(
                f"the request is too long: {tokens} tokens of context and what may be decoded need {needed} KV blocks; "
                f"the KV cache has {kv_pool.blocks.count} of {kv_pool.geometry.block_tokens} tokens",
                "messages",
            )
        return ThinkerRun(job, sequences, needed)

    def _draws(self, plan: Plan) -> list[Tensor]:
        """The posterior draws of the request's images for generation."""
        images = [segment for segment in plan.branches[0].segments if isinstance(segment, VaeSegment)]
        if not images or plan.flow is None:
            return []
        latent = self._model.latent
        return posterior_noise(images, latent.channels, latent.downsample, plan.flow.seed)

    def _worst_case(self, sequences: Sequence[BranchState], decoding: Decoding | None) -> int:
        """Blocks that a request holds at most; a fork may copy one block."""
        kv_pool = self._kv_pool
        size = kv_pool.geometry.block_tokens
        total = sum(
            kv_pool.blocks_for(sequence.total_tokens) - sequence.shared_tokens // size + bool(sequence.shared)
            for sequence in sequences
        )
        if decoding is not None:
            past = sequences[0].total_tokens
            decoded = kv_pool.blocks_for(past + 1 + decoding.max_new_tokens) - past // size + 1
            total += decoded * len(decoding.seeds)
            if decoding.purpose == "think":
                # The thought is appended encoded afresh, each broken character as three bytes.
                total += kv_pool.blocks_for(past + 2 + 3 * decoding.max_new_tokens) - past // size
        return total


def check_plan(plan: Plan, config: ModelConfig) -> None:
    """Refuse tokens and images that the model does not have a place for.

    Raises:
        InvalidRequest: names what it is and what is allowed.
    """
    if plan.decoding is not None:
        _check_token(plan.decoding.first_token, config)
    expected = _sizes(plan.branches[0].segments)
    if expected and plan.flow is None:
        raise InvalidRequest.value("plan", "an image for generation", "one only where flow says what to generate")
    for branch in plan.branches:
        for segment in branch.segments:
            if isinstance(segment, TextSegment):
                _check_token(max(segment.token_ids), config)
            else:
                _check_image(segment, config)
        sizes = _sizes(branch.segments)
        if sizes != expected[: len(sizes)]:  # a draw belongs to an image by its number
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
