"""Servers that load a part of the weights answer as one that loads all, and refuse the rest."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import torch

from bagel_triton.deploy import hosts
from bagel_triton.deploy.config import ConfigError, DeployConfig
from bagel_triton.engine.build import StageResources, build_decoder, build_dit, build_thinker
from bagel_triton.engine.preprocess.planner import RequestPlanner
from bagel_triton.ipc.shm import SHM_DIRECTORY
from bagel_triton.model.device import Placement
from bagel_triton.pipeline.local import LocalStages
from bagel_triton.protocol.errors import InvalidRequest
from bagel_triton.protocol.request import GenerationRequest
from bagel_triton.serving import memory_plan
from bagel_triton.weights.checkpoint import Checkpoint
from tests.support.images import png
from tests.support.runs import generate, result_of

TEXT = GenerationRequest(prompt="What is this?", modality="text", max_tokens=12)
IMAGE = GenerationRequest(prompt="A cute cat", height=32, width=32, seed=1, num_inference_steps=3)


@pytest.fixture
def config(checkpoint_dir: Path) -> Iterator[DeployConfig]:
    """Of a server that loads all, whose files are removed."""
    prefix = f"bagel_triton_test_{secrets.token_hex(4)}"
    yield DeployConfig(str(checkpoint_dir), device="cpu", dtype="float32", shm_prefix=prefix)
    for path in SHM_DIRECTORY.glob(f"{prefix}*"):
        path.unlink()


def loading(config: DeployConfig, load: str) -> DeployConfig:
    return msgspec.structs.replace(config, load=load)


class PartlySlim(LocalStages):
    """A thinker with all weights, and the stages of another host."""

    def __init__(self, config: DeployConfig) -> None:
        slim = StageResources.open(loading(config, "generation"))
        self.planner = RequestPlanner.open(config)
        self.thinker, self.dit = build_thinker(StageResources.open(config)), build_dit(slim)
        self.decoder = build_decoder(slim)
        self._engines = (self.decoder, self.dit, self.thinker)


def test_an_image_of_a_host_that_only_generates_is_the_same(config: DeployConfig, local_stages: LocalStages) -> None:
    stages = PartlySlim(config)
    found = generate(stages, IMAGE).pixels[0]
    stages.close()
    assert torch.equal(found, generate(local_stages, IMAGE).pixels[0])


def test_texts_of_a_server_that_only_understands_are_the_same(config: DeployConfig, local_stages: LocalStages) -> None:
    slim = loading(config, "understanding")
    thinker, planner = build_thinker(StageResources.open(slim)), RequestPlanner.open(slim)
    for request in (TEXT, msgspec.structs.replace(TEXT, image=(png(40, 60, seed=1),))):
        plan = planner.expand(request)
        found, _ = thinker.submit(plan, plan.request_id, lambda event: None).done.result(60)
        expected = result_of(local_stages.think(result_of(local_stages.expand(request))))
        assert [answer.content for answer in found.answers] == [answer.content for answer in expected.answers]
    drawing = result_of(local_stages.expand(IMAGE))
    with pytest.raises(InvalidRequest, match="allowed: a text: this server has load=understanding"):
        thinker.submit(drawing, "r", lambda event: None).done.result(60)
    thinker.close()
    with pytest.raises(InvalidRequest, match="images are made by a server that is started with load=all"):
        planner.expand(IMAGE)


def test_the_plan_is_what_is_loaded(config: DeployConfig) -> None:
    placement = Placement(torch.device("cpu"), torch.float32)

    def loaded(load: str) -> tuple[int, memory_plan.MemoryPlan]:
        part = msgspec.structs.replace(config, load=load, stage_id=1 if load == "generation" else None)
        checkpoint = Checkpoint(config.checkpoint, load=part.load)
        modules = [checkpoint.load_bagel(placement.torch_device, torch.float32)]
        if load != "understanding":
            modules.append(checkpoint.load_autoencoder(placement.torch_device, torch.float32))  # type: ignore[arg-type]
        size = sum(tensor.nbytes for module in modules for tensor in module.state_dict().values())
        return size, memory_plan.plan(checkpoint, part, placement, 64, 64)

    sizes = {}
    for load in ("all", "understanding", "generation"):
        sizes[load], plan = loaded(load)
        assert plan.weights == sizes[load], load
        stages = {"understanding": ["thinker"], "generation": ["dit", "vae_decode"]}
        assert [stage.stage for stage in plan.stages] == stages.get(load, ["thinker", "dit", "vae_decode"])
    assert sizes["understanding"] < 0.7 * sizes["all"]
    assert sizes["generation"] < sizes["all"]


def test_which_models_are_served(config: DeployConfig) -> None:
    assert loading(config, "understanding").models == ("cfg_expand", "thinker", "bagel", "bagel_infer")
    assert "dit" in config.models


@pytest.mark.parametrize(
    "changes", [{"pipeline": "bagel_single_stage"}, {"stage_id": 0}, {"addresses": {1: ("10.0.0.2:8001",)}}]
)
def test_understanding_alone_is_for_one_host(config: DeployConfig, changes: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="load='understanding' is not allowed"):
        msgspec.structs.replace(config, load="understanding", **changes)


def test_generation_alone_is_for_stage_1(config: DeployConfig) -> None:
    config = msgspec.structs.replace(loading(config, "generation"), addresses={1: ("127.0.0.1:8001",)})
    for stage in (None, 0):
        with pytest.raises(ConfigError, match="load='generation' is not allowed here; allowed: with --stage-id 1"):
            hosts.on_this_host(config, stage)
    assert hosts.on_this_host(config, 1, headless=True).load == "generation"
