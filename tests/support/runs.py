"""Whole and partial requests through stages that live in this process."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from torch import Tensor

from bagel_triton.engine.dit.run import Latents
from bagel_triton.pipeline.local import LocalStages
from bagel_triton.pipeline.pipeline import Result, StageCall
from bagel_triton.protocol.messages import DenoiseJob, Plan
from bagel_triton.protocol.request import GenerationRequest

WAIT_S = 60.0


@dataclass(frozen=True)
class Run:
    """What one request led to: for each image its latents and its pixels, uint8 [height, width, 3]."""

    plan: Plan
    latents: list[Latents]
    pixels: list[Tensor]


def result_of(call: StageCall[Result]) -> Result:
    """What the stage answers; its error is raised."""
    following = call.follow(lambda: False, WAIT_S)
    while True:
        try:
            next(following)
        except StopIteration as end:
            result: Result = end.value[0]
            return result


def think(stages: LocalStages, request: GenerationRequest) -> tuple[Plan, DenoiseJob]:
    """The plan of a request for an image, and its contexts, lent."""
    plan = result_of(stages.expand(request))
    job = result_of(stages.think(plan)).job
    assert job is not None
    return plan, job


def generate(stages: LocalStages, request: GenerationRequest) -> Run:
    """``request`` from prompt to pixels."""
    plan, job = think(stages, request)
    latents = result_of(stages.denoise(job))
    decoding = [stages.decode(one, plan.request_id, plan.scheduling) for one in latents]
    return Run(plan, list(latents), [result_of(call) for call in decoding])


def generate_together(stages: LocalStages, requests: Sequence[GenerationRequest]) -> list[Run]:
    """Every request at once, each from its own thread, in the requests' order."""
    barrier = threading.Barrier(len(requests))

    def work(request: GenerationRequest) -> Run:
        barrier.wait()
        return generate(stages, request)

    with ThreadPoolExecutor(len(requests)) as pool:
        return list(pool.map(work, requests))
