"""Editing, thinking, TaylorSeer and text against the recorded numbers of the model authors' code."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import Tensor

from bagel_triton.kv.connectors.local import LocalConsumer
from bagel_triton.pipeline.local import LocalStages
from bagel_triton.protocol.messages import (
    Branch,
    BranchPlan,
    Plan,
    SchedulingParams,
    TextSegment,
    VaeSegment,
    VitSegment,
)
from tests.support.cases import Case, load_cases
from tests.support.kv import claim
from tests.support.runs import result_of

CASES = load_cases(Path(__file__).parents[1] / "data" / "cases-a")
IMAGES = [case for case in CASES if case.height and not case.plain]
TEXTS = [case for case in CASES if not case.height]
TOLERANCE = 2e-5


def named(cases: list[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


def distance(ours: Tensor, expected: Tensor) -> float:
    assert ours.shape == expected.shape
    return float((ours.double() - expected.double()).abs().max() / expected.double().abs().max())


def plan_of(stages: LocalStages, case: Case) -> Plan:
    return result_of(stages.expand(case.request))


@named(IMAGES)
def test_contexts_latents_and_image(local_stages: LocalStages, case: Case) -> None:
    expected = case.tensors()
    thoughts = result_of(local_stages.think(plan_of(local_stages, case)))
    assert [answer.reasoning for answer in thoughts.answers] == ([] if case.text is None else [case.text])
    job = thoughts.job
    assert job is not None
    assert {context.branch for context in job.branches} == set(Branch)
    for context in job.branches:
        handle = job.handles[context.handle]
        assert handle.next_position == int(expected[f"rope.{context.branch}"])
    (latents,) = result_of(local_stages.denoise(job))
    assert distance(latents.tokens, expected["latent"]) < TOLERANCE
    difference = (result_of(local_stages.decode(latents, "", SchedulingParams())).int() - case.image().int()).abs()
    assert int(difference.max()) <= 2
    assert float((difference == 0).float().mean()) >= 0.99


@named(IMAGES)
def test_keys_and_values(local_stages: LocalStages, case: Case) -> None:
    job = result_of(local_stages.think(plan_of(local_stages, case))).job
    assert job is not None
    contexts = [claim(LocalConsumer(), handle) for handle in job.handles]
    expected = case.tensors()
    for context in job.branches:
        kv = contexts[context.handle][:, :, :: case.kv_token_stride]  # [layers, 2, tokens, kv_heads, head_dim]
        if f"kv.{context.branch}.k" not in expected:
            assert kv.shape[2] == 0
            continue
        assert distance(kv[:, 0], expected[f"kv.{context.branch}.k"]) < TOLERANCE
        assert distance(kv[:, 1], expected[f"kv.{context.branch}.v"]) < TOLERANCE


@named(TEXTS)
def test_texts(local_stages: LocalStages, case: Case) -> None:
    thoughts = result_of(local_stages.think(plan_of(local_stages, case)))
    assert [answer.content for answer in thoughts.answers] == [case.text]
    assert thoughts.job is None


def kinds(branch: BranchPlan) -> list[str]:
    names = {TextSegment: "text", VitSegment: "vit", VaeSegment: "vae"}
    return [names[type(segment)] for segment in branch.segments]


def test_an_edit_is_planned_in_three_branches(local_stages: LocalStages) -> None:
    case = next(case for case in CASES if case.name == "edit_alpha_two_pictures")
    branches = {branch.branch: kinds(branch) for branch in plan_of(local_stages, case).branches}
    assert branches == {
        Branch.GEN: ["vae", "vit", "vae", "vit", "text"],
        Branch.CFG_TEXT: ["vae", "vit", "vae", "vit"],
        Branch.CFG_IMG: ["text"],
    }
