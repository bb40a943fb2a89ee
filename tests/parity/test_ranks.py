"""The DiT on several ranks: the recorded numbers, and those of one rank."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from torch import Tensor

from bagel_triton.deploy.config import DeployConfig, DitConfig
from bagel_triton.engine.build import StageResources
from bagel_triton.pipeline.local import LocalStages
from bagel_triton.protocol.errors import Cancelled
from tests.parity.test_text2img import MIXED
from tests.support.cases import Case, load_cases
from tests.support.exact import assert_same
from tests.support.runs import generate, generate_together, result_of, think

CASES = [case for case in load_cases(Path(__file__).parents[1] / "data" / "cases-a") if case.height]
TOLERANCE = 2e-5


def config_of(directory: Path, **sizes: int) -> DeployConfig:
    return DeployConfig(checkpoint=str(directory), device="cpu", dtype="float32", dit=DitConfig(**sizes))


def stages_of(directory: Path, **sizes: int) -> LocalStages:
    return LocalStages(config_of(directory, **sizes))


def distance(ours: Tensor, expected: Tensor) -> float:
    assert ours.shape == expected.shape
    return float((ours.double() - expected.double()).abs().max() / expected.double().abs().max())


def check_mixed_load(several: LocalStages, directory: Path, exact: bool) -> None:
    """Many requests at once, with ``n``, sizes, step counts and guidance of all kinds."""
    one = stages_of(directory)
    expected = generate_together(one, MIXED)
    one.close()
    for run, alone in zip(generate_together(several, MIXED), expected, strict=True):
        for latents, before in zip(run.latents, alone.latents, strict=True):
            if exact:
                assert_same(latents.tokens, before.tokens)
            assert distance(latents.tokens, before.tokens) < TOLERANCE
        for pixels, before in zip(run.pixels, alone.pixels, strict=True):
            assert int((pixels.int() - before.int()).abs().max()) <= 1


@pytest.mark.long
@pytest.mark.parametrize("size", ["tensor_parallel_size", "cfg_parallel_size"])
def test_four_ranks_give_what_one_does(other_checkpoint: Path, size: str) -> None:
    """That checkpoint has one KV head, which every rank has then; and most requests have fewer branches than ranks."""
    several = stages_of(other_checkpoint, **{size: 4})
    try:
        check_mixed_load(several, other_checkpoint, exact=size == "cfg_parallel_size")
    finally:
        several.close()


@pytest.mark.long
@pytest.mark.parametrize("size", ["tensor_parallel_size", "cfg_parallel_size"])
def test_ranks_are_started_anew_after_a_sleep(checkpoint_dir: Path, size: str) -> None:
    """A sleep of level 1 closes the engines and keeps what they were built from."""
    config = config_of(checkpoint_dir, **{size: 2})
    resources = StageResources.open(config)
    found = []
    for _ in range(2):
        stages = LocalStages(config, resources=resources)
        found.append(generate(stages, MIXED[2]))
        stages.close()
    assert_same(found[0].pixels[0], found[1].pixels[0])


@pytest.fixture(scope="module", params=["tensor_parallel_size", "cfg_parallel_size"])
def ranks(request: pytest.FixtureRequest, checkpoint_dir: Path) -> Iterator[LocalStages]:
    stages = stages_of(checkpoint_dir, **{request.param: 2})
    yield stages
    stages.close()


QUICK = ("t2i_default",)


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=case.name, marks=() if case.name in QUICK else pytest.mark.long) for case in CASES],
)
def test_two_ranks_give_what_is_recorded(ranks: LocalStages, case: Case) -> None:
    run = generate(ranks, case.request)
    assert distance(run.latents[0].tokens, case.tensors()["latent"]) < TOLERANCE
    difference = (run.pixels[0].int() - case.image().int()).abs()
    assert int(difference.max()) <= 2


def test_a_mixed_load_is_that_of_one_rank(ranks: LocalStages, checkpoint_dir: Path) -> None:
    check_mixed_load(ranks, checkpoint_dir, exact=ranks.dit.config.cfg_parallel_size > 1)


def test_a_request_that_is_aborted_leaves_no_store(ranks: LocalStages) -> None:
    request = msgspec.structs.replace(MIXED[0], num_inference_steps=1000)
    _, job = think(ranks, request)
    call = ranks.denoise(job)
    next(call.follow(lambda: False, 60))  # it has begun
    ranks.abort(job.request_id)
    with pytest.raises(Cancelled):
        result_of(call)
    assert ranks.dit.ranks is not None
    assert ranks.dit.ranks.stores == 0
    generate(ranks, MIXED[2])  # the ranks are in step
    assert ranks.dit.ranks.stores == 0
