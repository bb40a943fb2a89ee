"""Text to image against the recorded numbers of the model authors' code, and against itself alone."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import torch
from torch import Tensor

from bagel_triton.deploy.config import DeployConfig
from bagel_triton.kv.connectors.local import LocalConsumer
from bagel_triton.model.flow import initial_noise
from bagel_triton.model.tokenizer import Tokenizer
from bagel_triton.pipeline.local import LocalStages
from bagel_triton.protocol.messages import Branch, DenoiseJob, Plan
from bagel_triton.protocol.request import GenerationRequest
from bagel_triton.weights.checkpoint import Checkpoint
from tests.support.cases import Case, load_cases
from tests.support.exact import assert_same
from tests.support.kv import claim
from tests.support.naive import NaiveBagel
from tests.support.runs import generate, generate_together, think

CASES = [case for case in load_cases(Path(__file__).parents[1] / "data" / "cases-a") if case.plain]
TOLERANCE = 2e-5
ROUNDING = 5e-6  # between two ways to compute the same on one machine
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def _distance(ours: Tensor, expected: Tensor) -> float:
    assert ours.shape == expected.shape
    return float((ours.double() - expected.double()).abs().max() / expected.double().abs().max())


def _contexts(job: DenoiseJob) -> dict[str, tuple[Tensor, int]]:
    """By branch, the leased KV, [layers, 2, tokens, ...], and the next position."""
    read = [claim(LocalConsumer(), handle) for handle in job.handles]
    return {c.branch.value: (read[c.handle], job.handles[c.handle].next_position) for c in job.branches}


@each_case
def test_contexts_are_those_recorded(local_stages: LocalStages, case: Case) -> None:
    plan, job = think(local_stages, case.request)
    gen = next(branch for branch in plan.branches if branch.branch is Branch.GEN)
    assert tuple(i for segment in gen.segments for i in segment.token_ids) == case.prompt_ids
    expected, contexts = case.tensors(), _contexts(job)
    assert set(contexts) == {"gen", "cfg_text", "cfg_img"}
    for branch, (kv, next_position) in contexts.items():
        assert next_position == int(expected[f"rope.{branch}"])
        if f"kv.{branch}.k" not in expected:
            assert kv.shape[2] == 0
            continue
        assert _distance(kv[:, 0], expected[f"kv.{branch}.k"]) < TOLERANCE
        assert _distance(kv[:, 1], expected[f"kv.{branch}.v"]) < TOLERANCE


@each_case
def test_the_noise_is_that_recorded(case: Case) -> None:
    expected = case.tensors()["init_noise"]
    assert case.request.seed is not None
    assert torch.equal(initial_noise(case.request.seed, *expected.shape).to(expected.dtype), expected)


@each_case
def test_latents_and_images_are_those_recorded(local_stages: LocalStages, case: Case) -> None:
    run = generate(local_stages, case.request)
    assert _distance(run.latents[0].tokens, case.tensors()["latent"]) < TOLERANCE
    difference = (run.pixels[0].int() - case.image().int()).abs()
    assert run.pixels[0].shape == (case.height, case.width, 3)
    assert int(difference.max()) <= 2
    assert float((difference == 0).float().mean()) >= 0.99


# Odd token counts, so that batches have odd numbers of rows; one prompt twice; every renorm; guidance on, off, in part.
MIXED = [
    GenerationRequest(prompt="A cute cat", height=144, width=112, seed=1, num_inference_steps=4),
    GenerationRequest(prompt="A cute cat", height=80, width=80, seed=2, num_inference_steps=3, cfg_interval=(0.0, 1.0)),
    GenerationRequest(prompt="A futuristic city", height=16, width=16, seed=3, num_inference_steps=9, cfg_text_scale=1),
    GenerationRequest(
        prompt="A beautiful sunset over mountains",
        negative_prompt="A blurry image",
        height=64,
        width=176,
        seed=4,
        num_inference_steps=9,
        cfg_renorm_type="channel",
        cfg_renorm_min=0.2,
    ),
    GenerationRequest(
        prompt="A city", height=176, width=48, seed=5, num_inference_steps=2, cfg_renorm_type="text_channel"
    ),
    GenerationRequest(prompt="A cat", height=208, width=112, seed=6, num_inference_steps=4, cfg_img_scale=1.0),
    GenerationRequest(
        prompt="A cat",
        height=176,
        width=144,
        seed=6,
        num_inference_steps=4,
        timestep_shift=1.0,
        cfg_interval=(0.3, 0.8),
    ),
    GenerationRequest(prompt="Two dogs " * 20, height=48, width=48, seed=7, num_inference_steps=6, n=3),
]


@pytest.mark.parametrize("checkpoint", ["checkpoint_dir", "other_checkpoint"])
def test_an_image_does_not_depend_on_its_batch(checkpoint: str, request: pytest.FixtureRequest) -> None:
    directory = request.getfixturevalue(checkpoint)
    stages = LocalStages(DeployConfig(checkpoint=str(directory), device="cpu", dtype="float32"))
    alone = [generate(stages, one) for one in MIXED]
    together = generate_together(stages, MIXED)
    for number, (ours, expected) in enumerate(zip(together, alone, strict=True)):
        for latents, before in zip(ours.latents, expected.latents, strict=True):
            assert_same(latents.tokens, before.tokens, number)
        for pixels, before in zip(ours.pixels, expected.pixels, strict=True):
            assert_same(pixels, before, number)
    stages.close()


def _naive(directory: Path, plan: Plan) -> Tensor:
    """The plan's latents, each branch prefilled and denoised on its own."""
    tokenizer = Tokenizer(directory)
    bagel = Checkpoint(directory).load_bagel(torch.device("cpu"), torch.float32)
    naive = NaiveBagel(bagel, (tokenizer.vision_start, tokenizer.vision_end))
    contexts = {
        branch.branch: naive.prefill([i for segment in branch.segments for i in segment.token_ids])
        for branch in plan.branches
        if branch.same_as is None
    }
    for branch in plan.branches:
        if branch.same_as is not None:
            contexts[branch.branch] = contexts[branch.same_as]
    assert plan.flow is not None
    return naive.latents(plan.flow, contexts)


@pytest.mark.parametrize("number", range(7))
@pytest.mark.parametrize("checkpoint", ["checkpoint_dir", "other_checkpoint"])
def test_the_packed_flow_is_the_plain_loop(checkpoint: str, number: int, request: pytest.FixtureRequest) -> None:
    directory = request.getfixturevalue(checkpoint)
    stages = LocalStages(DeployConfig(checkpoint=str(directory), device="cpu", dtype="float32"))
    run = generate(stages, MIXED[number])
    stages.close()
    assert _distance(run.latents[0].tokens, _naive(directory, run.plan)) < ROUNDING


def test_a_negative_prompt_stands_in_the_text_free_branch(local_stages: LocalStages, checkpoint_dir: Path) -> None:
    base = GenerationRequest(prompt="A cute cat", height=64, width=96, seed=3, num_inference_steps=6)
    plain = generate(local_stages, base)
    negative = generate(local_stages, msgspec.structs.replace(base, negative_prompt="A blurry image"))
    again = generate(
        local_stages, msgspec.structs.replace(base, negative_prompt="<|im_start|>A blurry image<|im_end|>")
    )
    tokenizer = Tokenizer(checkpoint_dir)
    bagel = Checkpoint(checkpoint_dir).load_bagel(torch.device("cpu"), torch.float32)
    naive = NaiveBagel(bagel, (tokenizer.vision_start, tokenizer.vision_end))
    prompt = naive.prefill(tokenizer.segment("A cute cat").token_ids)
    text_free = naive.prefill([tokenizer.start, *tokenizer.encode("A blurry image"), tokenizer.end])
    contexts = {Branch.GEN: prompt, Branch.CFG_TEXT: text_free, Branch.CFG_IMG: prompt}
    assert plain.plan.flow is not None
    assert _distance(negative.latents[0].tokens, naive.latents(plain.plan.flow, contexts)) < ROUNDING
    assert torch.equal(again.latents[0].tokens, negative.latents[0].tokens)
    assert _distance(negative.latents[0].tokens, plain.latents[0].tokens) > 1e-3
    tokens = negative.plan.usage.prompt_tokens - plain.plan.usage.prompt_tokens
    assert tokens == len(tokenizer.encode("A blurry image")) + 2


def test_a_prompt_prefilled_in_pieces_is_the_same_prompt(local_stages: LocalStages, checkpoint_dir: Path) -> None:
    request = GenerationRequest(prompt="A cute cat on a mountain " * 8, seed=1)
    thinker = msgspec.structs.replace(DeployConfig(checkpoint=str(checkpoint_dir)).thinker, max_num_batched_tokens=7)
    config = DeployConfig(checkpoint=str(checkpoint_dir), device="cpu", dtype="float32", thinker=thinker)
    in_pieces = LocalStages(config)
    (pieces, _), (whole, _) = (_contexts(think(stages, request)[1])["gen"] for stages in (in_pieces, local_stages))
    in_pieces.close()
    assert _distance(pieces, whole) < ROUNDING
