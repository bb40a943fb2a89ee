"""Stages that compute nothing: each answers with the name of what it was given."""

from __future__ import annotations

import itertools
import threading
from dataclasses import dataclass, field
from typing import Any

from bagel_triton.pipeline.pipeline import StageCall
from bagel_triton.protocol.errors import StageUnavailable
from bagel_triton.protocol.events import ProgressEvent, Stage, StageStats
from bagel_triton.protocol.messages import (
    Answer,
    Branch,
    BranchPlan,
    FlowSettings,
    Plan,
    SchedulingParams,
    ThinkerOutput,
    Usage,
)

FLOW = FlowSettings(
    height=64,
    width=96,
    num_inference_steps=3,
    seed=11,
    timestep_shift=3.0,
    cfg_text_scale=4.0,
    cfg_img_scale=1.5,
    cfg_interval=(0.4, 1.0),
    cfg_renorm_type="global",
    cfg_renorm_min=0.0,
)


@dataclass
class FakeStages:
    """``flow`` and ``answers`` are what every request gets.

    ``errors`` and ``silent`` name stages that fail or never answer; ``delays`` are seconds a prompt.
    ``others`` counts servers of the DiT that take over from one that failed, and do not fail.
    """

    flow: FlowSettings | None = FLOW
    answers: tuple[Answer, ...] = ()
    errors: dict[str, Exception] = field(default_factory=dict)
    delays: dict[str, float] = field(default_factory=dict)
    silent: str | None = None
    refuses: str | None = None
    others: int = 0
    called: list[str] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    _numbers: itertools.count[int] = field(default_factory=lambda: itertools.count(1))

    def expand(self, request: str) -> StageCall[Plan]:
        plan = Plan(
            f"{request}-{next(self._numbers)}",
            branches=(BranchPlan(Branch.GEN),),
            flow=self.flow,
            usage=Usage(image_tokens=24),
        )
        return self._call("cfg_expand", plan)

    def think(self, plan: Plan) -> StageCall[ThinkerOutput]:
        name = plan.request_id.rpartition("-")[0]
        job: Any = f"job of {name}" if plan.flow else None  # a name in place of a job
        return self._call("thinker", ThinkerOutput(self.answers, job))

    def denoise(self, job: str) -> StageCall[list[str]]:
        assert self.flow is not None, "an image was asked for"
        delay = next((delay for name, delay in self.delays.items() if job.endswith(name)), 0.0)
        progress = [ProgressEvent("dit", step, 2) for step in (1, 2)]
        latents = [f"latents {number} of {job}" for number in range(self.flow.num_images)]
        return self._call("dit", latents, progress, delay)

    def decode(self, latents: str, request_id: str, scheduling: SchedulingParams) -> StageCall[str]:
        return self._call("vae_decode", f"pixels of {latents}")

    def elsewhere(self) -> bool:
        if not self.others:
            return False
        self.others -= 1
        self.errors = {}
        return True

    def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)

    def _call(
        self, stage: Stage, result: object, progress: list[ProgressEvent] | None = None, delay: float = 0.0
    ) -> StageCall[Any]:
        if stage == self.refuses:
            raise StageUnavailable(f"{stage} is not loaded")
        self.called.append(stage)
        call: StageCall[Any] = StageCall(stage)
        if stage == self.silent:
            return call
        for event in progress or []:
            call.progress(event)
        if stage in self.errors:
            call.fail(self.errors[stage])
        else:
            threading.Timer(delay, call.finish, (result, StageStats(stage, 0.0, delay))).start()
        return call
