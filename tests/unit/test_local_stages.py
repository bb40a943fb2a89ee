"""Stages in one process under pressure: queues, full pools, clients that leave, and the end."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from bagel_triton.deploy.config import DeployConfig, DitConfig, ThinkerConfig
from bagel_triton.kv import lease as lease_module
from bagel_triton.pipeline.local import LocalStages
from bagel_triton.pipeline.pipeline import GeneratedImage, Pipeline
from bagel_triton.protocol.errors import Cancelled, InvalidRequest, LeaseError, Overloaded, StageUnavailable
from bagel_triton.protocol.events import ProgressEvent
from bagel_triton.protocol.request import GenerationRequest
from tests.support.runs import generate, generate_together, result_of, think
from tests.support.waiting import soon

Make = Callable[..., LocalStages]
SMALL = GenerationRequest(prompt="A cute cat", height=32, width=32, seed=1, num_inference_steps=3)
LONG = GenerationRequest(prompt="A cute cat", height=160, width=160, seed=1, num_inference_steps=1000)


@pytest.fixture
def make(checkpoint_dir: Path) -> Iterator[Make]:
    """Makes stages of the settings given; closes them."""
    made: list[LocalStages] = []

    def build(thinker: ThinkerConfig = ThinkerConfig(), dit: DitConfig = DitConfig()) -> LocalStages:  # noqa: B008
        config = DeployConfig(checkpoint=str(checkpoint_dir), device="cpu", dtype="float32", thinker=thinker, dit=dit)
        made.append(LocalStages(config))
        return made[-1]

    yield build
    for stages in made:
        stages.close()


def _nothing_left(stages: LocalStages) -> bool:
    return stages.thinker.blocks_used == 0 and len(stages.producer.leases) == 0


def test_an_image_leaves_nothing_in_the_arena(local_stages: LocalStages) -> None:
    generate(local_stages, SMALL)
    assert soon(lambda: _nothing_left(local_stages))


def test_a_client_that_leaves_while_denoising_frees_the_next_ones_place(make: Make) -> None:
    stages = make(dit=DitConfig(max_num_seqs=1))
    events = Pipeline(stages, 30.0).run(LONG)
    assert next(events) == ProgressEvent("dit", 1, 999)
    start = time.monotonic()
    events.close()  # type: ignore[attr-defined]
    generate(stages, SMALL)
    assert time.monotonic() - start < 3.0  # the rest of the long one takes far longer
    assert soon(lambda: _nothing_left(stages))


def test_an_aborted_requests_contexts_are_taken_back(local_stages: LocalStages) -> None:
    plan, job = think(local_stages, SMALL)
    assert not _nothing_left(local_stages)
    local_stages.abort(plan.request_id)
    assert soon(lambda: _nothing_left(local_stages))
    with pytest.raises(LeaseError, match="has ended"):
        result_of(local_stages.denoise(job))


def test_a_request_that_waits_longer_than_its_lease_still_gets_its_image(make: Make) -> None:
    """The lease guards against a reader that died, not against one that is busy."""
    stages = make(thinker=ThinkerConfig(lease_ttl_s=0.5), dit=DitConfig(max_num_seqs=1))
    long = GenerationRequest(prompt="A cute cat", height=160, width=160, seed=1, num_inference_steps=60)
    runs = generate_together(stages, [long, long, long])
    assert len(runs) == 3


LENGTHY = "A cute cat on a mountain " * 70
WHERE = GenerationRequest("Where?", modality="text", seed=1)
TOO_LONG = "is not allowed: the request is too long"


@pytest.mark.parametrize("modality", ["image", "text"])
def test_a_prompt_longer_than_the_arena_is_refused(make: Make, modality: str) -> None:
    stages = make(thinker=ThinkerConfig(kv_tokens=512))
    with pytest.raises(InvalidRequest, match=rf"^messages='\d+ tokens of context' {TOO_LONG}; allowed: at most 512 "):
        think(stages, GenerationRequest(LENGTHY, modality=modality, seed=1))
    assert generate(stages, SMALL).pixels[0].shape == (32, 32, 3)


@pytest.mark.parametrize(
    ("fields", "name", "beside"),
    [
        ({"max_tokens": 999}, "max_tokens", "6 tokens of context"),
        ({"max_tokens": 999, "n": 2}, "max_tokens", "6 tokens of context and 2 results"),
        ({"max_tokens": 100, "n": 9}, "n", "6 tokens of context and 100 for each result"),
        ({"modality": "image", "think": True}, "max_think_tokens", r"\d+ tokens of context"),
    ],
)
def test_what_may_be_decoded_is_refused_if_it_is_longer_than_the_arena(
    make: Make, fields: dict[str, Any], name: str, beside: str
) -> None:
    stages = make(thinker=ThinkerConfig(kv_tokens=512))

    def run(**changes: int) -> None:
        result_of(stages.think(result_of(stages.expand(msgspec.structs.replace(WHERE, **{**fields, **changes})))))

    with pytest.raises(
        InvalidRequest, match=rf"^{name}=\d+ {TOO_LONG}, with {beside}; allowed: at most \d+$"
    ) as refused:
        run()
    assert refused.value.param == name
    most = int(refused.value.message.split()[-1])
    with pytest.raises(InvalidRequest, match=f"={most + 1} {TOO_LONG}|{TOO_LONG}.* and {most + 1} for each"):
        run(**{name: most + 1})
    run(**{name: most})


@pytest.mark.parametrize("words", range(1, 20, 3))
def test_any_context_and_what_is_decoded_have_the_length_that_clients_are_given(make: Make, words: int) -> None:
    config = ThinkerConfig(kv_tokens=160)
    stages, prompt = make(thinker=config), "a " * words
    context = result_of(stages.expand(msgspec.structs.replace(WHERE, prompt=prompt))).usage.prompt_tokens
    request = msgspec.structs.replace(WHERE, prompt=prompt, max_tokens=config.max_model_len - context)
    assert result_of(stages.think(result_of(stages.expand(request)))).answers


@pytest.mark.parametrize("temperature", [5e-324, 1e-40, 1e-5, 2.0])
@pytest.mark.parametrize(
    "fields",
    [{}, {"top_p": 5e-324}, {"top_p": 1e-40, "top_k": 1}, {"repetition_penalty": 0.01}, {"repetition_penalty": 2.0}],
    ids=str,
)
def test_whatever_sampling_is_allowed_is_an_answer(
    local_stages: LocalStages, temperature: float, fields: dict[str, float]
) -> None:
    request = GenerationRequest("Where?", modality="text", max_tokens=4, seed=1, temperature=temperature, **fields)
    (answer,) = result_of(local_stages.think(result_of(local_stages.expand(request)))).answers
    assert answer.tokens > 0


def test_next_to_no_temperature_is_greedy(local_stages: LocalStages) -> None:
    request = GenerationRequest("Where?", modality="text", max_tokens=8, seed=1)
    plans = [
        result_of(local_stages.expand(msgspec.structs.replace(request, temperature=temperature)))
        for temperature in (0.0, 1e-6)
    ]
    assert plans[0].decoding == plans[1].decoding


def test_several_greedy_answers_are_the_same(local_stages: LocalStages) -> None:
    request = GenerationRequest("Where?", modality="text", max_tokens=4, n=2)
    first, second = result_of(local_stages.think(result_of(local_stages.expand(request)))).answers
    assert first == second


def test_a_full_arena_is_waited_for(make: Make) -> None:
    stages = make(thinker=ThinkerConfig(kv_tokens=32, block_tokens=16))
    runs = generate_together(stages, [SMALL] * 6)
    assert len(runs) == 6
    assert all((run.pixels[0] == runs[0].pixels[0]).all() for run in runs)


def test_an_arena_that_stays_full_is_overload(make: Make) -> None:
    stages = make(thinker=ThinkerConfig(kv_tokens=16, block_tokens=16, admission_timeout_s=0.1))
    plan, _ = think(stages, SMALL)  # never claimed
    with pytest.raises(Overloaded, match=r"had no room for \d+ s: KV blocks wanted: 1, free: 0 of 1$"):
        generate(stages, SMALL)
    stages.abort(plan.request_id)
    assert generate(stages, SMALL).pixels[0].shape == (32, 32, 3)


def test_an_abort_of_the_first_in_the_queue_leaves_nothing_at_the_thinker(make: Make) -> None:
    stages = make(thinker=ThinkerConfig(kv_tokens=16, block_tokens=16))
    think(stages, SMALL)  # never claimed, and the pool has no room for another
    plan = result_of(stages.expand(SMALL))
    waits = threading.Event()
    job = stages.thinker.submit(plan, plan.request_id, lambda event: waits.set())
    assert waits.wait(10.0)
    stages.abort(plan.request_id)
    with pytest.raises(Cancelled):
        job.done.result(10.0)
    left = weakref.ref(job)
    del job
    assert soon(lambda: gc.collect() >= 0 and left() is None)


def test_a_full_lease_table_fails_the_requests_that_find_it_full_and_no_other(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_module, "SLOTS", 1)
    stages = make()
    counted: list[str] = []
    monkeypatch.setattr(stages.thinker.metrics, "count", lambda name, *labels: counted.append(name))
    plan, job = think(stages, SMALL)
    with pytest.raises(Overloaded, match="no KV lease is free"):
        think(stages, SMALL)
    assert counted.count("thinker_refused") == 1
    assert len(result_of(stages.denoise(job))) == 1
    assert soon(lambda: _nothing_left(stages))
    assert generate(stages, SMALL).pixels[0].shape == (32, 32, 3)
    assert plan.request_id == job.request_id


def test_closing_fails_what_is_under_way_and_what_comes_later(make: Make) -> None:
    stages = make()
    events = Pipeline(stages, 30.0).run(LONG)
    next(events)
    stages.close()
    with pytest.raises(StageUnavailable, match="dit is shutting down"):
        list(events)
    with pytest.raises(StageUnavailable, match="thinker is shutting down"):
        generate(stages, SMALL)


def test_a_request_reports_every_event(local_stages: LocalStages) -> None:
    *progress, image, done = Pipeline(local_stages, 30.0).run(SMALL)
    assert progress == [ProgressEvent("dit", step, 2) for step in (1, 2)]
    assert isinstance(image, GeneratedImage)
    assert image.pixels.shape == (32, 32, 3)
    assert (image.event.seed, done.seed) == (1, 1)  # type: ignore[union-attr]
    assert done.usage.image_tokens == 4  # type: ignore[union-attr]
    assert done.usage.prompt_tokens == 6  # type: ignore[union-attr]
    assert all(stats.run_s >= 0 and stats.queue_s >= 0 for stats in done.stages)  # type: ignore[union-attr]
