"""The plain transformer, as a GPU runs it, on a CPU: every recorded case within the executor's own tolerance."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from bagel_triton.deploy.config import DeployConfig
from bagel_triton.kv.connectors.local import LocalConsumer
from bagel_triton.model.cpu import executor
from bagel_triton.pipeline.local import LocalStages
from tests.parity.test_every_kind import TOLERANCE, distance
from tests.support.cases import Case, load_cases
from tests.support.kv import claim
from tests.support.runs import result_of

DATA = Path(__file__).parents[1] / "data"
CASES = load_cases(DATA / "cases-a")


@pytest.fixture(scope="module")
def plain_stages() -> Iterator[LocalStages]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(executor, "CpuExecutor", lambda transformer, pool: transformer)
        stages = LocalStages(DeployConfig(checkpoint=str(DATA / "tiny-a"), device="cpu", dtype="float32"))
    yield stages
    stages.close()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_case_is_the_one_recorded(plain_stages: LocalStages, case: Case) -> None:
    plan = result_of(plain_stages.expand(case.request))
    output = result_of(plain_stages.think(plan))
    if output.job is None:
        assert [answer.content for answer in output.answers] == [case.text]
        return
    expected = case.tensors()
    (latents,) = result_of(plain_stages.denoise(output.job))
    assert distance(latents.tokens, expected["latent"]) < TOLERANCE
    job = result_of(plain_stages.think(plan)).job
    assert job is not None
    contexts = [claim(LocalConsumer(), handle) for handle in job.handles]
    for context in job.branches:
        if f"kv.{context.branch}.k" in expected:
            kv = contexts[context.handle][:, :, :: case.kv_token_stride]
            assert distance(kv[:, 0], expected[f"kv.{context.branch}.k"]) < TOLERANCE
            assert distance(kv[:, 1], expected[f"kv.{context.branch}.v"]) < TOLERANCE
