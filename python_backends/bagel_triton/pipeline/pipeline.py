"""The life of a request: the order of the stages, and the clean-up when one fails."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Generic, Protocol, TypeVar

import msgspec

from bagel_triton.protocol.errors import BagelError, Cancelled, DeadlineExceeded, StageUnavailable, from_exception
from bagel_triton.protocol.events import (
    AnswerEvent,
    DoneEvent,
    Event,
    ImageEvent,
    PartialImageEvent,
    Preview,
    ProgressEvent,
    Stage,
    StageStats,
)
from bagel_triton.protocol.intervals import REQUEST_S
from bagel_triton.protocol.messages import (
    Answer,
    DenoiseJob,
    FlowSettings,
    Plan,
    SchedulingParams,
    ThinkerOutput,
    Usage,
)
from bagel_triton.telemetry.tracing import (
    Attributes,
    Span,
    image_attributes,
    request_attributes,
    size_attributes,
    text_attributes,
)

RequestT = TypeVar("RequestT", contravariant=True)
LatentsT = TypeVar("LatentsT")
PixelsT = TypeVar("PixelsT")
T = TypeVar("T")
LAST_WORDS_S = 0.3  # answers of a dead process, or of another process of its stage, may still arrive
Result = TypeVar("Result")


class StageCall(Generic[Result]):
    """A queue that the stage fills from any thread and one orchestrator follows.

    ``alive`` tells whether the stage can still answer. It is checked while the stage is silent.
    ``given_up`` becomes true when the orchestrator no longer waits for the answer.
    """

    def __init__(self, stage: Stage, alive: Callable[[], bool] = lambda: True) -> None:
        self.stage, self.started_at = stage, time.time()
        self.alive, self.given_up = alive, False
        self._items: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.done: Future[tuple[Result, StageStats]] = Future()

    def progress(self, event: Any) -> None:
        """Report an event of the stage; any event also shows that the stage is alive."""
        self._items.put(event)

    def finish(self, result: Result, stats: StageStats) -> None:
        """End the call with the stage's answer."""
        self._items.put((result, stats))
        if not self.done.done():
            self.done.set_result((result, stats))

    def fail(self, error: BaseException) -> None:
        """End the call with an error."""
        self._items.put(from_exception(error))
        if not self.done.done():
            self.done.set_exception(from_exception(error))

    def follow(
        self, cancelled: Callable[[], bool], timeout_s: float, deadline: float | None = None
    ) -> Generator[Any, None, tuple[Result, StageStats]]:
        """Yield events until the answer, and return it.

        Raises:
            Cancelled: ``cancelled`` became true.
            DeadlineExceeded: it is later than ``deadline``, Unix seconds.
            StageUnavailable: the stage died, or was silent for ``timeout_s`` seconds.
            BagelError: the stage failed.
        """
        try:
            return (yield from self._follow(cancelled, timeout_s, deadline))
        finally:
            self.given_up = True

    def _follow(
        self, cancelled: Callable[[], bool], timeout_s: float, deadline: float | None
    ) -> Generator[Any, None, tuple[Result, StageStats]]:
        heard_at = alive_at = time.monotonic()
        while True:
            if cancelled():
                raise Cancelled("the client cancelled the request")
            if deadline is not None and time.time() > deadline:
                raise DeadlineExceeded(f"the request's timeout passed while it was at {self.stage}", "timeout")
            try:
                item = self._items.get(timeout=REQUEST_S)
            except queue.Empty:
                now = time.monotonic()
                if self.alive():
                    alive_at = now
                elif now - alive_at > LAST_WORDS_S:
                    raise StageUnavailable(f"{self.stage} died") from None
                if now - heard_at > timeout_s:
                    raise StageUnavailable(f"{self.stage} was silent for {timeout_s:g} s") from None
                continue
            heard_at = alive_at = time.monotonic()
            if isinstance(item, BagelError):
                raise item
            if isinstance(item, tuple):
                return item
            yield item


class Stages(Protocol[RequestT, LatentsT, PixelsT]):
    """The four stages, wherever they run. Each method starts a call and returns at once."""

    def expand(self, request: RequestT) -> StageCall[Plan]:
        """``cfg_expand``: validate and plan."""

    def think(self, plan: Plan) -> StageCall[ThinkerOutput]:
        """``thinker``: prefill, decode text, and lend the contexts."""

    def denoise(self, job: DenoiseJob) -> StageCall[Sequence[LatentsT]]:
        """``dit``: claim the contexts and run the flow, of every image asked for."""

    def decode(self, latents: LatentsT, request_id: str, scheduling: SchedulingParams) -> StageCall[PixelsT]:
        """``vae_decode``: one image's latents to uint8 [height, width, 3]."""

    def elsewhere(self) -> bool:
        """Whether the request, which a stage's server failed, can be tried at another server of it; at most once."""

    def abort(self, request_id: str) -> None:
        """Stop the request's work in every stage and revoke its leases."""


@dataclass(frozen=True)
class GeneratedImage(Generic[PixelsT]):
    """A finished image and its description."""

    event: ImageEvent
    pixels: PixelsT


@dataclass(frozen=True)
class PartialImage(Generic[PixelsT]):
    """A preview and its description."""

    event: PartialImageEvent
    pixels: PixelsT


Item = Event | GeneratedImage[PixelsT] | PartialImage[PixelsT]


class Pipeline(Generic[RequestT, LatentsT, PixelsT]):
    """Chains the stages for one request at a time per call; calls may run in parallel."""

    def __init__(self, stages: Stages[RequestT, LatentsT, PixelsT], stage_timeout_s: float) -> None:
        self._stages, self._timeout_s = stages, stage_timeout_s

    def run(
        self,
        request: RequestT,
        cancelled: Callable[[], bool] = lambda: False,
        span: Span | None = None,
        timeout_s: float | None = None,
    ) -> Iterator[Item[PixelsT]]:
        """Events of one request, :class:`DoneEvent` last; ``span``, the request's, gets a child for each call.

        ``timeout_s`` is the time that the request allows, as far as it is known before the plan says it.

        Raises:
            BagelError: the request failed; nothing of it is left in any stage.
        """
        times: list[StageStats] = []
        started = time.time()
        deadline = None if timeout_s is None else started + timeout_s
        whole = span or Span()
        followed: StageCall[Any]

        def show(preview: Item[PixelsT]) -> None:
            followed.progress(preview)

        def follow(
            call: StageCall[T], attributes: Attributes = MappingProxyType({})
        ) -> Generator[Item[PixelsT], None, T]:
            nonlocal followed
            followed = call
            with whole.child(call.stage, call.started_at) as part:
                part.set_attributes(attributes)
                for item in (following := _Following(call.follow(cancelled, self._timeout_s, deadline))):
                    if isinstance(item, Preview):
                        self._decode_preview(item, show, plan)
                    else:
                        yield item
                result, stats = following.result
                part.set_attributes({"queue_s": stats.queue_s, "run_s": stats.run_s})
                if isinstance(result, ThinkerOutput):
                    part.set_attributes(text_attributes(result.answers))
            times.append(stats)
            return result

        plan = yield from follow(self._stages.expand(request))
        whole.set_attributes(request_attributes(plan))
        if plan.scheduling.deadline is not None:  # it was set when the plan was made, which took its time
            deadline = plan.scheduling.deadline - (time.time() - started)
        images: Sequence[PixelsT] = ()
        finished = False
        try:
            output = yield from follow(self._stages.think(plan), {"prompt_tokens": plan.usage.prompt_tokens})
            whole.set_attributes(text_attributes(output.answers))
            yield from _answers(output.answers)
            if output.job is not None:
                latents = yield from self._denoised(follow, plan, output)
                images = yield from self._decoded(follow, plan, latents)
            finished = True
        finally:
            if not finished:  # also when the consumer closes this generator
                self._stages.abort(plan.request_id)
        if plan.flow is not None:
            yield from _images(plan.flow, images)
        yield DoneEvent(plan.request_id, _seed(plan), _usage(plan, output.answers), _by_stage(times))

    def _denoised(
        self, follow: Callable[..., Generator[Any, None, Any]], plan: Plan, output: ThinkerOutput
    ) -> Generator[Any, None, Sequence[LatentsT]]:
        """The latents; from another server of the DiT where the first one failed."""
        assert output.job is not None, "an image was asked for"
        latents: Sequence[LatentsT]
        try:
            latents = yield from follow(self._stages.denoise(output.job), image_attributes(plan.flow))
            return latents
        except StageUnavailable:
            if not self._stages.elsewhere():
                raise
            # The server that failed may have claimed the contexts, so they are lent anew, from the prefix cache.
            self._stages.abort(plan.request_id)
            repeated = _Following(follow(self._stages.think(plan)))
            for item in repeated:
                if isinstance(item, ProgressEvent):  # the text is known already
                    yield item
            if repeated.result.job is None or repeated.result.answers != output.answers:
                raise  # an image of another thought than the one that was streamed
        latents = yield from follow(self._stages.denoise(repeated.result.job), image_attributes(plan.flow))
        return latents

    def _decoded(
        self, follow: Callable[..., Generator[Any, None, Any]], plan: Plan, latents: Sequence[LatentsT]
    ) -> Generator[Any, None, list[PixelsT]]:
        """The pixels of each image; likewise."""
        images: list[PixelsT] = []
        while True:
            calls = [self._stages.decode(one, plan.request_id, plan.scheduling) for one in latents[len(images) :]]
            try:
                for call in calls:
                    images.append((yield from follow(call, size_attributes(plan.flow))))
                return images
            except StageUnavailable:
                if not self._stages.elsewhere():
                    raise

    def _decode_preview(
        self, preview: Preview[LatentsT], show: Callable[[PartialImage[PixelsT]], None], plan: Plan
    ) -> None:
        """Have a preview decoded and shown, unless the finished images are there first."""
        scheduling = msgspec.structs.replace(plan.scheduling, preview=True)

        def deliver(decoded: Future[tuple[PixelsT, StageStats]]) -> None:
            if decoded.exception() is None:  # a preview that failed is left out
                show(PartialImage(preview.event, decoded.result()[0]))

        self._stages.decode(preview.latents, plan.request_id, scheduling).done.add_done_callback(deliver)


class _Following(Generic[T]):
    """Iterates over a generator and keeps its return value."""

    result: T

    def __init__(self, items: Generator[Any, None, T]) -> None:
        self._items = items

    def __iter__(self) -> Iterator[Any]:
        self.result = yield from self._items


def _answers(answers: Sequence[Answer]) -> Iterator[AnswerEvent]:
    for index, answer in enumerate(answers):
        yield AnswerEvent(index, answer.content, answer.reasoning, answer.finish_reason, answer.logprobs)


def _images(flow: FlowSettings, images: Sequence[PixelsT]) -> Iterator[GeneratedImage[PixelsT]]:
    for index, (seed, pixels) in enumerate(zip(flow.seeds, images, strict=True)):
        yield GeneratedImage(ImageEvent(index, flow.height, flow.width, seed), pixels)


def _seed(plan: Plan) -> int | None:
    if plan.flow is not None:
        return plan.flow.seed
    sampled = plan.decoding is not None and plan.decoding.temperature > 0
    return plan.decoding.seeds[0] if plan.decoding is not None and sampled else None


def _usage(plan: Plan, answers: Sequence[Answer]) -> Usage:
    return msgspec.structs.replace(
        plan.usage,
        text_tokens=sum(answer.tokens for answer in answers),
        reasoning_tokens=sum(answer.reasoning_tokens for answer in answers),
    )


def _by_stage(times: Sequence[StageStats]) -> tuple[StageStats, ...]:
    """One entry a stage: of several calls, to decode ``n`` images, the sums."""
    merged: dict[str, StageStats] = {}
    for one in times:
        before = merged.get(one.stage, StageStats(one.stage, 0.0, 0.0))
        merged[one.stage] = StageStats(one.stage, before.queue_s + one.queue_s, before.run_s + one.run_s)
    return tuple(merged.values())
