"""The dtype of a GPU on a CPU: near the recorded numbers, which are float32."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bagel_triton.deploy.config import DeployConfig
from bagel_triton.pipeline.local import LocalStages
from tests.support.cases import load_cases
from tests.support.nearness import mean_levels, relative_rms
from tests.support.runs import generate

CASES = {case.name: case for case in load_cases(Path(__file__).parents[1] / "data" / "cases-a")}
RMS, LEVELS = 0.1, 4.0  # several times what rounding to 8 bits makes of these cases


@pytest.fixture(scope="module")
def stages() -> Iterator[LocalStages]:
    checkpoint = Path(__file__).parents[1] / "data" / "tiny-a"
    stages = LocalStages(DeployConfig(checkpoint=str(checkpoint), device="cpu", dtype="bfloat16"))
    yield stages
    stages.close()


@pytest.mark.parametrize("name", ["t2i_default", "t2i_channel_renorm", "t2i_think", "t2i_taylorseer", "edit_wide"])
def test_an_image_is_near_the_one_recorded(stages: LocalStages, name: str) -> None:
    run = generate(stages, CASES[name].request)
    assert stages.producer.pool.store.dtype == torch.bfloat16
    assert run.latents[0].tokens.dtype == torch.float32
    assert relative_rms(run.latents[0].tokens, CASES[name].tensors()["latent"]) < RMS
    assert mean_levels(run.pixels[0], CASES[name].image()) < LEVELS
