"""A request's way through the stages, and what is undone when it does not get to the end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import msgspec
import pytest

from bagel_triton.pipeline.pipeline import GeneratedImage, PartialImage, Pipeline, StageCall
from bagel_triton.protocol.errors import (
    BagelError,
    Cancelled,
    DeadlineExceeded,
    Internal,
    InvalidRequest,
    StageUnavailable,
)
from bagel_triton.protocol.events import AnswerEvent, DoneEvent, PartialImageEvent, Preview, ProgressEvent, StageStats
from bagel_triton.protocol.messages import Answer, SchedulingParams
from tests.support.fake_stages import FLOW, FakeStages


def _run(stages: FakeStages, cancelled: Callable[[], bool] = lambda: False, timeout_s: float = 5.0) -> list[object]:
    return list(Pipeline(stages, timeout_s).run("a cat", cancelled))


def test_a_request_visits_the_stages_in_order_and_ends_with_done() -> None:
    stages = FakeStages()
    *progress, image, done = _run(stages)
    assert progress == [ProgressEvent("dit", 1, 2), ProgressEvent("dit", 2, 2)]
    assert isinstance(image, GeneratedImage)
    assert image.pixels == "pixels of latents 0 of job of a cat"
    assert (image.event.height, image.event.width, image.event.seed) == (64, 96, 11)
    assert isinstance(done, DoneEvent)
    assert (done.request_id, done.seed, done.usage.image_tokens) == ("a cat-1", 11, 24)
    assert [stats.stage for stats in done.stages] == ["cfg_expand", "thinker", "dit", "vae_decode"]
    assert stages.aborted == []


def test_a_request_for_several_images_gets_each_with_its_seed() -> None:
    stages = FakeStages(flow=msgspec.structs.replace(FLOW, num_images=3))
    images = [event for event in _run(stages) if isinstance(event, GeneratedImage)]
    assert [image.pixels for image in images] == [f"pixels of latents {n} of job of a cat" for n in range(3)]
    assert [(image.event.index, image.event.seed) for image in images] == [(0, 11), (1, 12), (2, 13)]


def test_a_request_for_text_ends_after_the_thinker() -> None:
    answer = Answer("It is a cat", "whiskers", "length", tokens=9, reasoning_tokens=4)
    stages = FakeStages(flow=None, answers=(answer,))
    told, done = _run(stages)
    assert told == AnswerEvent(0, "It is a cat", "whiskers", "length")
    assert isinstance(done, DoneEvent)
    assert (done.seed, done.usage.text_tokens, done.usage.reasoning_tokens) == (None, 9, 4)
    assert stages.called == ["cfg_expand", "thinker"]


def test_requests_that_end_out_of_order_keep_their_own_results() -> None:
    stages = FakeStages(delays={"slow": 0.2})
    results: dict[str, str] = {}
    order: list[str] = []

    def work(name: str) -> None:
        for event in Pipeline(stages, 5.0).run(name):
            if isinstance(event, GeneratedImage):
                results[name] = event.pixels
        order.append(name)

    threads = [threading.Thread(target=work, args=(name,)) for name in ("slow", "fast")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert order == ["fast", "slow"]
    assert results == {name: f"pixels of latents 0 of job of {name}" for name in ("slow", "fast")}


@pytest.mark.parametrize("stage", ["thinker", "dit", "vae_decode"])
def test_a_failed_stage_is_the_requests_error_and_the_rest_is_undone(stage: str) -> None:
    stages = FakeStages(errors={stage: InvalidRequest("too long", "prompt")})
    with pytest.raises(InvalidRequest, match="too long"):
        _run(stages)
    assert stages.aborted == ["a cat-1"]
    assert stages.called[-1] == stage


def test_a_refused_request_leaves_nothing_to_undo() -> None:
    stages = FakeStages(errors={"cfg_expand": InvalidRequest("no", "prompt")})
    with pytest.raises(InvalidRequest):
        _run(stages)
    assert stages.aborted == []
    assert stages.called == ["cfg_expand"]


def test_an_error_of_no_known_kind_is_internal_and_names_itself() -> None:
    stages = FakeStages(errors={"dit": ZeroDivisionError("by zero")})
    with pytest.raises(Internal, match="ZeroDivisionError: by zero"):
        _run(stages)


@pytest.mark.parametrize("stage", ["cfg_expand", "thinker", "dit", "vae_decode"])
def test_a_silent_stage_is_unavailable(stage: str) -> None:
    stages = FakeStages(silent=stage)
    with pytest.raises(StageUnavailable, match=rf"^{stage} was silent for 0\.1 s"):
        _run(stages, timeout_s=0.1)
    assert stages.aborted == ([] if stage == "cfg_expand" else ["a cat-1"])


def test_a_requests_timeout_counts_while_its_plan_is_waited_for() -> None:
    stages = FakeStages(silent="cfg_expand")
    with pytest.raises(DeadlineExceeded, match="timeout passed while it was at cfg_expand"):
        list(Pipeline(stages, 30.0).run("a cat", timeout_s=0.1))
    assert stages.called == ["cfg_expand"]


class _SlowPreviews(FakeStages):
    """The first latents to be decoded, a preview's, are done only when the image's own are being decoded."""

    def denoise(self, job: str) -> StageCall[list[str]]:
        call = super().denoise(job)
        call.progress(Preview(PartialImageEvent(0, 0, 1, 2, 64, 96), "early latents"))
        return call

    def decode(self, latents: str, request_id: str, scheduling: SchedulingParams) -> StageCall[str]:
        if scheduling.preview:
            self.preview: StageCall[str] = StageCall("vae_decode")
            return self.preview
        call: StageCall[str] = StageCall("vae_decode")
        stats = StageStats("vae_decode", 0.0, 0.0)
        threading.Timer(0.1, self.preview.finish, ("early pixels", stats)).start()
        threading.Timer(0.3, call.finish, ("pixels", stats)).start()
        return call


def test_a_preview_that_is_decoded_after_the_last_step_still_comes_before_the_image() -> None:
    shown = [
        item.pixels
        for item in _run(_SlowPreviews(delays={"a cat": 0.1}))
        if isinstance(item, GeneratedImage | PartialImage)
    ]
    assert shown == ["early pixels", "pixels"]


def test_progress_keeps_a_slow_stage_alive() -> None:
    call: StageCall[str] = StageCall("dit")

    def work() -> None:
        for step in range(8):
            time.sleep(0.05)
            call.progress(ProgressEvent("dit", step + 1, 8))
        call.finish("done", StageStats("dit", 0.0, 0.4))

    thread = threading.Thread(target=work)
    thread.start()
    assert len(list(call.follow(lambda: False, timeout_s=0.2))) == 8
    thread.join()


def test_a_client_that_left_is_noticed_while_a_stage_is_silent() -> None:
    stages = FakeStages(silent="dit")
    with pytest.raises(Cancelled):
        _run(stages, cancelled=lambda: stages.called[-1] == "dit", timeout_s=60.0)
    assert stages.aborted == ["a cat-1"]


def test_a_client_that_left_between_stages_starts_no_other() -> None:
    stages = FakeStages()
    with pytest.raises(Cancelled):
        _run(stages, cancelled=lambda: "thinker" in stages.called)
    assert "dit" not in stages.called
    assert stages.aborted == ["a cat-1"]


def test_a_reader_that_goes_away_is_undone_like_a_failure() -> None:
    stages = FakeStages()
    events = Pipeline(stages, 5.0).run("a cat")
    assert next(events) == ProgressEvent("dit", 1, 2)
    events.close()  # type: ignore[attr-defined]
    assert stages.aborted == ["a cat-1"]


def test_a_reader_that_goes_after_the_image_leaves_nothing_to_undo() -> None:
    stages = FakeStages()
    events = Pipeline(stages, 5.0).run("a cat")
    while not isinstance(next(events), GeneratedImage):
        pass
    events.close()  # type: ignore[attr-defined]
    assert stages.aborted == []


def test_a_stage_that_cannot_even_be_called_is_undone() -> None:
    stages = FakeStages(refuses="dit")
    with pytest.raises(BagelError):
        _run(stages)
    assert stages.aborted == ["a cat-1"]


def test_a_stage_that_died_is_not_waited_for() -> None:
    call: StageCall[str] = StageCall("dit", alive=lambda: False)
    call.progress(ProgressEvent("dit", 1, 8))
    start = time.monotonic()
    with pytest.raises(StageUnavailable, match=r"^dit died$"):
        list(call.follow(lambda: False, timeout_s=60.0))
    assert time.monotonic() - start < 30.0


def test_an_answer_that_was_on_its_way_when_its_stage_died_still_counts() -> None:
    call: StageCall[str] = StageCall("dit", alive=lambda: False)
    late = threading.Timer(0.15, call.finish, ("done", StageStats("dit", 0.0, 0.1)))
    late.start()
    followed = call.follow(lambda: False, timeout_s=60.0)
    with pytest.raises(StopIteration) as ended:
        next(followed)
    assert ended.value.value[0] == "done"
    late.join()


def test_a_stage_that_was_slow_before_it_died_gets_no_less_time_for_last_words() -> None:
    alive = threading.Event()
    alive.set()
    call: StageCall[str] = StageCall("dit", alive=alive.is_set)
    dies = threading.Timer(0.5, alive.clear)
    answers = threading.Timer(0.65, call.finish, ("done", StageStats("dit", 0.0, 0.1)))
    for timer in (dies, answers):
        timer.start()
    with pytest.raises(StopIteration):
        next(call.follow(lambda: False, timeout_s=60.0))
    for timer in (dies, answers):
        timer.join()


THOUGHT = Answer("", "whiskers", "stop", tokens=9, reasoning_tokens=9)


def test_a_request_whose_server_failed_is_done_at_another_and_its_text_comes_once() -> None:
    stages = FakeStages(answers=(THOUGHT,), errors={"dit": StageUnavailable("dit died")}, others=1)
    items = _run(stages)
    assert stages.called == ["cfg_expand", "thinker", "dit", "thinker", "dit", "vae_decode"]
    assert [item for item in items if isinstance(item, AnswerEvent)] == [AnswerEvent(0, "", "whiskers", "stop")]
    assert isinstance(items[-2], GeneratedImage)
    assert stages.aborted == ["a cat-1"]  # the leases that the first server may have claimed


@pytest.mark.parametrize("others", [0, 1])
def test_it_is_tried_once_more_at_most(others: int) -> None:
    class Failing(FakeStages):
        def elsewhere(self) -> bool:
            left, self.others = self.others, 0
            return left > 0

    stages = Failing(errors={"dit": StageUnavailable("dit died")}, others=others)
    with pytest.raises(StageUnavailable, match="dit died"):
        _run(stages)
    assert stages.called.count("dit") == 1 + others


def test_an_image_of_another_thought_than_the_one_shown_is_refused() -> None:
    class Forgetful(FakeStages):
        def elsewhere(self) -> bool:
            self.answers = (Answer("", "paws", "stop", tokens=5, reasoning_tokens=5),)
            return super().elsewhere()

    stages = Forgetful(answers=(THOUGHT,), errors={"dit": StageUnavailable("dit died")}, others=1)
    with pytest.raises(StageUnavailable, match="dit died"):
        _run(stages)


def test_images_that_are_left_are_decoded_elsewhere() -> None:
    class SecondFails(FakeStages):
        def decode(self, latents: str, request_id: str, scheduling: SchedulingParams) -> StageCall[str]:
            if not latents.startswith("latents 0") and self.others:
                self.errors = {"vae_decode": StageUnavailable("vae_decode died")}
            return super().decode(latents, request_id, scheduling)

    stages = SecondFails(flow=msgspec.structs.replace(FLOW, num_images=3), others=1)
    images = [item.pixels for item in _run(stages) if isinstance(item, GeneratedImage)]
    assert images == [f"pixels of latents {n} of job of a cat" for n in range(3)]
    assert stages.called == ["cfg_expand", "thinker", "dit", *["vae_decode"] * 5]
