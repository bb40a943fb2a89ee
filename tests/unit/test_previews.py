"""Previews of a running image: how many, of what, and that the image does not change."""

from __future__ import annotations

import threading

import pytest
import torch

from bagel_triton.engine.dit.run import Latents
from bagel_triton.engine.loop import Job
from bagel_triton.pipeline.local import LocalStages
from bagel_triton.pipeline.pipeline import GeneratedImage, PartialImage, Pipeline
from bagel_triton.protocol.errors import Cancelled
from bagel_triton.protocol.events import DoneEvent, Preview
from bagel_triton.protocol.messages import SchedulingParams
from bagel_triton.protocol.request import GenerationRequest
from tests.support.runs import generate, result_of, think

REQUEST = GenerationRequest("A cute cat", height=64, width=96, num_inference_steps=9, seed=3)


def _with(**fields: object) -> GenerationRequest:
    return GenerationRequest(
        **{name: getattr(REQUEST, name) for name in REQUEST.__struct_fields__ if name not in fields} | fields  # type: ignore[arg-type]
    )


def _previews(stages: LocalStages, request: GenerationRequest) -> list[Preview[Latents]]:
    """What the DiT reports for previews."""
    _, job = think(stages, request)
    call = stages.denoise(job)
    found = [item for item in call.follow(lambda: False, 60.0) if isinstance(item, Preview)]
    return found


@pytest.mark.parametrize(("wanted", "steps"), [(0, []), (1, [4]), (2, [3, 5]), (3, [2, 4, 6])])
def test_previews_are_spread_evenly_over_the_updates(local_stages: LocalStages, wanted: int, steps: list[int]) -> None:
    previews = _previews(local_stages, _with(partial_images=wanted))
    assert [preview.event.step for preview in previews] == steps
    assert [preview.event.partial_index for preview in previews] == list(range(wanted))
    assert all((preview.event.steps, preview.event.index) == (8, 0) for preview in previews)


def test_a_preview_is_what_the_rest_of_the_flow_would_give_at_this_velocity(local_stages: LocalStages) -> None:
    """With one update left the predicted image is the image itself, but for rounding."""
    previews = _previews(local_stages, _with(partial_images=3, num_inference_steps=5, timestep_shift=1.0))
    final = generate(local_stages, _with(num_inference_steps=5, timestep_shift=1.0)).latents[0].tokens
    distances = [float((preview.latents.tokens - final).norm()) for preview in previews]
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < distances[0]


@pytest.mark.parametrize("cache", ["none", "taylorseer"])
def test_previews_change_no_image(local_stages: LocalStages, cache: str) -> None:
    plain = generate(local_stages, _with(cache=cache, n=2))
    previewed = generate(local_stages, _with(cache=cache, n=2, partial_images=3))
    for first, second in zip(plain.pixels, previewed.pixels, strict=True):
        assert torch.equal(first, second)


def test_previews_come_as_images_before_the_image(local_stages: LocalStages) -> None:
    # Steps of a size at which a preview is decoded long before the flow ends.
    request = _with(partial_images=2, num_inference_steps=400, n=2)
    items = list(Pipeline(local_stages, 60.0).run(request))
    partial = [item for item in items if isinstance(item, PartialImage)]
    images = [item for item in items if isinstance(item, GeneratedImage)]
    assert [(item.event.index, item.event.partial_index) for item in partial] == [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert all(item.pixels.shape == (64, 96, 3) for item in partial)
    assert items.index(partial[-1]) < items.index(images[0])
    assert isinstance(items[-1], DoneEvent)
    assert [image.event.seed for image in images] == [3, 4]


def test_previews_wait_behind_images_and_go_when_their_own_image_comes(
    local_stages: LocalStages, monkeypatch: pytest.MonkeyPatch
) -> None:
    latents = generate(local_stages, REQUEST).latents[0]
    decoder, ended = local_stages.decoder, list[str]()
    hold, held = threading.Event(), threading.Event()

    def wait() -> None:
        held.set()
        hold.wait(30.0)

    decoder.call(wait)
    assert held.wait(30.0)  # everything that follows is queued together
    jobs: dict[str, Job[Latents, torch.Tensor]] = {}
    for name, request_id, preview in (
        ("own preview", "a", True),
        ("other preview", "b", True),
        ("image", "a", False),
        ("later image", "c", False),
    ):
        jobs[name] = decoder.submit(latents, request_id, lambda event: None, SchedulingParams(preview=preview))
        jobs[name].done.add_done_callback(lambda _, name=name: ended.append(name))
    hold.set()
    assert isinstance(jobs["own preview"].done.exception(30.0), Cancelled)
    jobs["other preview"].done.result(30.0)
    assert ended == ["own preview", "image", "later image", "other preview"]


def test_the_decoder_keeps_a_requests_deadline_and_priority(local_stages: LocalStages) -> None:
    seen: list[SchedulingParams] = []
    submit = local_stages.decoder.submit

    def watch(*args: object) -> object:
        seen.append(args[3])  # type: ignore[arg-type]
        return submit(*args)  # type: ignore[arg-type]

    local_stages.decoder.submit = watch  # type: ignore[assignment]
    try:
        events = list(Pipeline(local_stages, 60.0).run(_with(priority=-7, timeout=500.0)))
    finally:
        local_stages.decoder.submit = submit  # type: ignore[method-assign]
    assert isinstance(events[-1], DoneEvent)
    (scheduling,) = seen
    assert scheduling.priority == -7
    assert scheduling.deadline is not None
    assert result_of(local_stages.expand(_with(priority=-7))).scheduling.priority == -7
