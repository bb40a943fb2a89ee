"""Every stage in this process: engines over one copy of the weights, behind the interface of :class:`Stages`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, TypeVar

from torch import Tensor

from bagel_triton.deploy.config import DeployConfig
from bagel_triton.deploy.topology import DECODER, DIT, THINKER
from bagel_triton.engine.build import Models, StageResources, open_ranks
from bagel_triton.engine.dit.engine import DitEngine
from bagel_triton.engine.dit.run import Latents
from bagel_triton.engine.loop import EngineLoop, Job
from bagel_triton.engine.preprocess.planner import RequestPlanner
from bagel_triton.engine.thinker.engine import ThinkerEngine, kv_geometry
from bagel_triton.engine.vae import DecoderEngine
from bagel_triton.kv.connectors.local import LocalConsumer, LocalProducer
from bagel_triton.parallel.sizes import Sizes, check_one_process
from bagel_triton.pipeline.pipeline import StageCall
from bagel_triton.protocol.events import StageStats
from bagel_triton.protocol.messages import DenoiseJob, Plan, SchedulingParams, ThinkerOutput
from bagel_triton.protocol.request import GenerationRequest
from bagel_triton.telemetry.metrics import Metrics

Task = TypeVar("Task")
Result = TypeVar("Result")


class LocalStages:
    """All stages in this process over one copy of the weights; KV by the ``local`` connector.

    ``models`` are run instead of the checkpoint's, whose tokenizer is still used. ``resources`` are those of
    ``config``, where they are open already.
    """

    def __init__(
        self,
        config: DeployConfig,
        metrics: Metrics | None = None,
        models: Models | None = None,
        resources: StageResources | None = None,
    ) -> None:
        resources = resources or StageResources.open(config)
        place, tokenizer = resources.placement, resources.tokenizer()
        sizes = [Sizes.of(config, stage) for stage in (THINKER, DIT)]
        # A process is in one group of ranks: the DiT's, which the thinker uses where they share the heads, or its own.
        together = sizes[0].tensor == sizes[1].tensor > 1
        check_one_process(config)
        models = Models.load(resources, own=together) if models is None else models
        model, autoencoder, model_config = models.bagel, models.autoencoder, models.config
        geometry = kv_geometry(model_config.language, config.thinker.block_tokens, place.dtype_name)
        blocks = -(-config.thinker.kv_tokens // config.thinker.block_tokens)
        self.producer = LocalProducer(geometry, blocks, place.torch_device)
        defaults = config.topology.think_by_default, config.bagel.request_timeout_s, config.request_defaults
        adapters = resources.load_adapters()
        self.planner = RequestPlanner(model_config, tokenizer, *defaults, adapters=adapters)
        vision_tokens = (tokenizer.vision_start, tokenizer.vision_end)
        pool = geometry, config.thinker.kv_tokens
        own = [
            model if together or not size.cut else replace(resources, weights=None).own_bagel(None) for size in sizes
        ]
        decoding = autoencoder if Sizes.of(config, DECODER).ranks > 1 else None
        ranks = [open_ranks(resources, DIT, own[1], False, decoding)]
        ranks.insert(0, ranks[0] if together else open_ranks(resources, THINKER, own[0], False, decoding))
        decoders = None if decoding is None else ranks[1] or ranks[0]
        if decoding is not None and decoders is None:
            decoders = open_ranks(resources, DECODER, None, False, decoding)
        thinker = self.producer, config.thinker, metrics, adapters, ranks[0]
        self.thinker = ThinkerEngine(own[0], autoencoder, tokenizer, *thinker)
        self.dit = DitEngine(own[1], LocalConsumer(), config.dit, vision_tokens, *pool, metrics, ranks[1], adapters)
        self.decoder = DecoderEngine(autoencoder, model_config.latent, config.decoder, metrics, decoders)
        self._engines: tuple[EngineLoop[Any, Any], ...] = (self.decoder, self.dit, self.thinker)

    def expand(self, request: GenerationRequest) -> StageCall[Plan]:
        """Plan at once, on the caller's thread."""
        call: StageCall[Plan] = StageCall("cfg_expand")
        started = time.perf_counter()
        plan = self.planner.expand(request)
        call.finish(plan, StageStats("cfg_expand", 0.0, time.perf_counter() - started))
        return call

    def think(self, plan: Plan) -> StageCall[ThinkerOutput]:
        """Queue at the thinker."""
        call: StageCall[ThinkerOutput] = StageCall("thinker")
        return follow_job(call, self.thinker.submit(plan, plan.request_id, call.progress, plan.scheduling))

    def denoise(self, job: DenoiseJob) -> StageCall[Sequence[Latents]]:
        """Queue at the DiT."""
        call: StageCall[Sequence[Latents]] = StageCall("dit")
        return follow_job(call, self.dit.submit(job, job.request_id, call.progress, job.scheduling))

    def decode(self, latents: Latents, request_id: str, scheduling: SchedulingParams) -> StageCall[Tensor]:
        """Queue at the decoder."""
        call: StageCall[Tensor] = StageCall("vae_decode")
        return follow_job(call, self.decoder.submit(latents, request_id, call.progress, scheduling))

    def elsewhere(self) -> bool:
        """Every engine is here."""
        return False

    def abort(self, request_id: str) -> None:
        """Abort in every engine."""
        for engine in self._engines:
            engine.abort(request_id)

    def abort_job(self, job: Job[Any, Any]) -> None:
        """Abort ``job``, whichever engine has it."""
        for engine in self._engines:
            engine.abort_job(job)

    def idle(self) -> Future[bool]:
        """Whether no engine has a job."""
        idle = Future[bool]()
        idle.set_result(all(engine.idle().result() for engine in self._engines))
        return idle

    @property
    def is_lost(self) -> bool:
        """Whether an engine has lost its device."""
        return any(engine.is_lost for engine in self._engines)

    def close(self) -> None:
        """Stop every engine."""
        for engine in self._engines:
            engine.close()


def follow_job(call: StageCall[Result], job: Job[Task, Result]) -> StageCall[Result]:
    """``call``, filled with the events and the result of ``job``."""

    def settle(done: Future[tuple[Result, StageStats]]) -> None:
        error = done.exception()
        if error is None:
            call.finish(*done.result())
        else:
            call.fail(error)

    job.done.add_done_callback(settle)
    return call
