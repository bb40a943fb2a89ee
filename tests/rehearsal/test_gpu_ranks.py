"""Rank 0 of several on a fake GPU: nothing mixes devices, and a step waits for no more than the step before it.

The other ranks are not there: what is sent to them is dropped, and what they send is whatever memory holds.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from bagel_triton.deploy.config import DeployConfig, DitConfig, ThinkerConfig
from bagel_triton.engine.build import StageResources
from bagel_triton.model.autoencoder import Autoencoder
from bagel_triton.model.bagel import Bagel
from bagel_triton.model.cpu.thread_pool import SINGLE_THREAD
from bagel_triton.parallel import group
from bagel_triton.parallel.group import RankGroup
from bagel_triton.parallel.patches import RankDecoder
from bagel_triton.parallel.rank import RankModel
from bagel_triton.parallel.sizes import Sizes
from bagel_triton.pipeline import local
from bagel_triton.protocol.request import GenerationRequest
from bagel_triton.serving.stage_memory import first_rank_weights
from bagel_triton.weights.checkpoint import Checkpoint
from tests.rehearsal.fake_gpu import Tally, fake_gpu
from tests.rehearsal.scenes import GPU, PROMPT, TINY, Stage, image, stage

MODES: dict[str, dict[str, Any]] = {
    "tensor": {"thinker": ThinkerConfig(tensor_parallel_size=2), "dit": DitConfig(tensor_parallel_size=2)},
    "cfg": {"dit": DitConfig(cfg_parallel_size=2)},
    "ulysses": {"dit": DitConfig(ulysses_degree=2)},
    "cfg_ulysses": {"dit": DitConfig(cfg_parallel_size=2, ulysses_degree=2)},
}


class Absent:
    """A rank that is not there."""

    connection: Any = None
    is_here = True

    def __init__(self) -> None:
        self._ended = threading.Event()

    def wait(self) -> str:
        self._ended.wait()
        return "has ended"

    def close(self) -> None:
        self._ended.set()

    def reap(self, timeout_s: float) -> None: ...


@contextlib.contextmanager
def process_group(ranks: int) -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def open_ranks(
    opened: list[RankGroup],
    resources: StageResources,
    name: str,
    model: Bagel | None,
    share: bool,
    autoencoder: Autoencoder | None = None,
) -> RankGroup | None:
    """What takes the place of starting processes."""
    sizes = Sizes.of(resources.config, name)
    if sizes.ranks == 1:
        return None
    ranks = RankGroup(name, [Absent() for _ in range(sizes.ranks - 1)], GPU, 1)
    assert model is not None
    ranks._model = RankModel(model, sizes, ranks._pool, GPU)
    opened.append(ranks)
    return ranks


def exchanged(taken: Tensor, given: Tensor, *sizes: Any, **group: Any) -> None:
    assert taken.device == given.device == GPU
    assert taken.dtype == given.dtype


@pytest.fixture(params=MODES)
def engines(request: pytest.FixtureRequest) -> Iterator[Stage]:
    opened: list[RankGroup] = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(process_group(4 if request.param == "cfg_ulysses" else 2))
        for owner, called, does in (
            (local, "open_ranks", partial(open_ranks, opened)),
            (group, "send", lambda x, rank: x.contiguous()),
            (group, "receive", lambda x, rank: x),
            (group.messages, "write", lambda connection, message: None),
            (dist, "all_to_all_single", exchanged),
        ):
            stack.enter_context(mock.patch.object(owner, called, does))
        yield stack.enter_context(stage(2, **MODES[request.param]))
        for ranks in opened:
            ranks.stop()


def test_steps_of_rank_0_wait_for_the_step_before_alone(engines: Stage) -> None:
    lent = engines.lent(image(256, steps=4))
    job = engines.stages.dit.submit(lent, lent.request_id, lambda event: None, lent.scheduling)
    _, *steps, last = engines.until(engines.stages.dit, job.done.done)
    assert steps
    assert [dict(step.waits) for step in steps] == [{"event": 1}] * len(steps)
    assert last.stops == 2  # and for the latents
    assert {step.masks for step in steps} == {0}


def test_a_token_of_several_ranks_is_one_download(engines: Stage) -> None:
    job = engines.think(GenerationRequest(prompt=PROMPT, modality="text", max_tokens=4))
    *_, token = engines.until(engines.stages.thinker, job.done.done)
    assert (token.downloads, token.masks) == (1, 0)
    assert token.stops <= 3


def test_a_decoder_of_ranks_does_not_wait() -> None:
    """Neither for the statistics of its norms nor for a neighbour's rows."""
    with process_group(2), stage(1) as engines:
        decoder = RankDecoder(engines.stages.decoder._autoencoder.decoder, 2, SINGLE_THREAD)
        z = torch.empty(1, 16, 32, 32, device=GPU)
        engines.gpu.tally = Tally()
        assert decoder.decode(z).shape == (1, 3, 256, 256)
        assert engines.gpu.tally.kernels
        assert engines.gpu.tally.stops == 0


def test_what_is_queued_ends_before_the_other_ranks_do() -> None:
    """It waits for their part, and NCCL's end for it."""
    waits: list[int] = []
    with fake_gpu() as gpu:

        class Ending(Absent):
            def close(self) -> None:
                super().close()
                waits.append(gpu.tally.waits["device"])

        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
        RankGroup("dit", [Ending()], GPU, 1).stop()
    assert waits == [1]


def test_a_part_of_the_weights_is_all_that_comes_to_the_gpu() -> None:
    config = DeployConfig(str(TINY), device="cuda:0", dtype="bfloat16")
    whole = Checkpoint(config.checkpoint).bagel(torch.bfloat16).language_model.model.layers
    with process_group(2), fake_gpu(), torch.inference_mode():
        model = Checkpoint(config.checkpoint).load_bagel(GPU, torch.bfloat16, cut=True)
        assert {weight.device.type for weight in model.parameters()} == {"cpu"}
        RankModel(model, Sizes(tensor=2), SINGLE_THREAD, GPU)
        layers = model.language_model.model.layers
        own = {
            name: weight.to_local() if isinstance(weight, DTensor) else weight
            for name, weight in layers.named_parameters()
        }
        assert {weight.device for weight in model.parameters()} == {GPU}
    counted = sum(
        (weight.to_local() if isinstance(weight, DTensor) else weight).nbytes for weight in model.parameters()
    )
    planned = first_rank_weights(Checkpoint(config.checkpoint).bagel(torch.bfloat16), Sizes(tensor=2))
    assert planned <= counted < 1.02 * planned  # norms are not cut
    sizes = {name: weight.numel() for name, weight in whole.named_parameters()}
    assert {own[name].numel() * 2 for name in own if "proj" in name} == {sizes[name] for name in own if "proj" in name}
