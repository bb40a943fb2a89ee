"""The life of a request: which stage follows which, and what is undone when one fails."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from bagel_triton.engine.visit import Visit
from bagel_triton.messages import (
    DenoiseJob,
    DoneEvent,
    PictureEvent,
    Plan,
    ProgressEvent,
    StageStats,
)

RequestT = TypeVar("RequestT", contravariant=True)
LatentsT = TypeVar("LatentsT")
PixelsT = TypeVar("PixelsT")
T = TypeVar("T")


class Stages(Protocol[RequestT, LatentsT, PixelsT]):
    """The four stages, wherever they run. Each call starts a visit and returns at once."""

    def expand(self, request: RequestT) -> Visit[Plan]:
        """``cfg_expand``: validate and plan."""

    def think(self, plan: Plan) -> Visit[DenoiseJob]:
        """``thinker``: prefill, and lend the contexts."""

    def denoise(self, job: DenoiseJob) -> Visit[LatentsT]:
        """``dit``: claim the contexts and run the flow."""

    def decode(self, latents: LatentsT) -> Visit[PixelsT]:
        """``vae_decode``: latents to uint8 [height, width, 3]."""

    def abandon(self, request_id: str) -> None:
        """Stop what a request has anywhere, and take its leases back."""


@dataclass(frozen=True)
class Picture(Generic[PixelsT]):
    """A finished picture and its description."""

    event: PictureEvent
    pixels: PixelsT


class Pipeline(Generic[RequestT, LatentsT, PixelsT]):
    """Chains the stages for one request at a time per call; calls may run in parallel."""

    def __init__(self, stages: Stages[RequestT, LatentsT, PixelsT], stage_timeout_s: float) -> None:
        self._stages, self._timeout_s = stages, stage_timeout_s

    def run(
        self, request: RequestT, cancelled: Callable[[], bool] = lambda: False
    ) -> Iterator[ProgressEvent | Picture[PixelsT] | DoneEvent]:
        """Events of one request, :class:`DoneEvent` last.

        Raises:
            BagelError: the request failed; nothing of it is left in any stage.
        """
        times: list[StageStats] = []

        def follow(visit: Visit[T]) -> Generator[ProgressEvent, None, T]:
            result, stats = yield from visit.follow(cancelled, self._timeout_s)
            times.append(stats)
            return result

        plan = yield from follow(self._stages.expand(request))
        finished = False
        try:
            job = yield from follow(self._stages.think(plan))
            latents = yield from follow(self._stages.denoise(job))
            pixels = yield from follow(self._stages.decode(latents))
            finished = True
        finally:
            if not finished:  # also when the consumer closes this generator
                self._stages.abandon(plan.request_id)
        flow = plan.flow
        yield Picture(PictureEvent(index=0, height=flow.height, width=flow.width, seed=flow.seed), pixels)
        yield DoneEvent(plan.request_id, flow.seed, "stop", plan.usage, tuple(times))
