"""Thinker and DiT on several ranks: the recorded numbers, and those of one rank."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Self

import msgspec
import pytest
from torch import Tensor
from torch.distributed.tensor import DTensor

from bagel_triton.deploy.config import DeployConfig, DitConfig, ThinkerConfig, VaeDecodeConfig
from bagel_triton.engine.build import StageResources
from bagel_triton.kv.connectors.local import LocalConsumer
from bagel_triton.pipeline.local import LocalStages
from bagel_triton.protocol.errors import Cancelled
from bagel_triton.protocol.messages import Answer
from bagel_triton.protocol.request import GenerationRequest
from tests.parity.test_every_kind import TOLERANCE, distance
from tests.parity.test_text2img import MIXED
from tests.support.cases import Case, load_cases
from tests.support.exact import assert_same
from tests.support.kv import claim
from tests.support.runs import Run, generate, generate_together, result_of, think

CASES = load_cases(Path(__file__).parents[1] / "data" / "cases-a")
TENSOR, CFG = DitConfig(tensor_parallel_size=2), DitConfig(cfg_parallel_size=2)
THINKER = ThinkerConfig(tensor_parallel_size=2)
# Thinker and DiT; "both" have one group of ranks, as this is one process.
MODES = {
    "both": (THINKER, TENSOR),
    "cfg": (ThinkerConfig(), CFG),
    "ulysses": (ThinkerConfig(), DitConfig(ulysses_degree=2)),
}
SLOW = {
    "thinker": (THINKER, DitConfig()),
    "dit": (ThinkerConfig(), TENSOR),
    "cfg_tensor": (THINKER, DitConfig(tensor_parallel_size=2, cfg_parallel_size=2)),
    "cfg_ulysses": (ThinkerConfig(), DitConfig(cfg_parallel_size=2, ulysses_degree=2)),
    "hsdp": (ThinkerConfig(), DitConfig(use_hsdp=True, hsdp_shard_size=2)),
    "hsdp_ulysses": (
        ThinkerConfig(),
        DitConfig(use_hsdp=True, cfg_parallel_size=2, ulysses_degree=2, hsdp_shard_size=2, hsdp_replicate_size=2),
    ),
}
# Fewer rows than four ranks.
SMALL = GenerationRequest(prompt="x", height=16, width=16, seed=1, num_inference_steps=3, cfg_text_scale=1.0)
TEXT = GenerationRequest(prompt="Describe a cat", modality="text", max_tokens=24)
TEXTS = [
    TEXT,
    msgspec.structs.replace(
        TEXT, prompt="Another prompt, a bit longer than the first one", n=3, seed=7, temperature=0.9
    ),
    msgspec.structs.replace(TEXT, n=2, seed=3, temperature=1.3, repetition_penalty=1.1, max_tokens=40),
]


def stages_of(
    directory: Path, thinker: ThinkerConfig, dit: DitConfig, decoder: VaeDecodeConfig | None = None
) -> LocalStages:
    fields = {"thinker": thinker, "dit": dit, "vae_decode": decoder or VaeDecodeConfig()}
    return LocalStages(DeployConfig(checkpoint=str(directory), device="cpu", dtype="float32", **fields))


def texts(stages: LocalStages) -> list[tuple[Answer, ...]]:
    """What all texts together are answered with."""
    calls = [stages.think(result_of(stages.expand(request))) for request in TEXTS]
    return [result_of(call).answers for call in calls]


@dataclass(frozen=True)
class Load:
    """What many requests at once lead to: ``n``, sizes, step counts and guidance of all kinds, and texts."""

    images: list[Run]
    texts: list[tuple[Answer, ...]]
    small: Run

    @classmethod
    def through(cls, stages: LocalStages) -> Self:
        return cls(generate_together(stages, MIXED), texts(stages), generate(stages, SMALL))


@cache
def one_rank(directory: Path) -> Load:
    stages = stages_of(directory, ThinkerConfig(), DitConfig())
    try:
        return Load.through(stages)
    finally:
        stages.close()


def check_mixed_load(several: LocalStages, directory: Path) -> None:
    """All at once is answered with what one rank gives: to the last bit where ranks share nothing but branches."""
    found, expected = Load.through(several), one_rank(directory)
    dit = several.dit.config
    exact = several.thinker._ranks is None and max(dit.tensor_parallel_size, dit.ulysses_degree, dit.shards) == 1
    for run, alone in zip(found.images, expected.images, strict=True):
        for latents, before in zip(run.latents, alone.latents, strict=True):
            if exact:
                assert_same(latents.tokens, before.tokens)
            assert distance(latents.tokens, before.tokens) < TOLERANCE
        for pixels, before in zip(run.pixels, alone.pixels, strict=True):
            assert int((pixels.int() - before.int()).abs().max()) <= 1
    assert found.texts == expected.texts
    assert distance(found.small.latents[0].tokens, expected.small.latents[0].tokens) < TOLERANCE


@pytest.mark.long
@pytest.mark.parametrize("mode", MODES)
def test_ranks_are_started_anew_after_a_sleep(checkpoint_dir: Path, mode: str) -> None:
    """A sleep of level 1 closes the engines and keeps what they were built from."""
    thinker, dit = MODES[mode]
    config = DeployConfig(checkpoint=str(checkpoint_dir), device="cpu", dtype="float32", thinker=thinker, dit=dit)
    resources = StageResources.open(config)
    found = []
    for _ in range(2):
        stages = LocalStages(config, resources=resources)
        found.append(generate(stages, MIXED[2]))
        stages.close()
    assert_same(found[0].pixels[0], found[1].pixels[0])


def test_a_rank_of_hsdp_keeps_its_part_of_every_layer(other_checkpoint: Path) -> None:
    """And gives what one rank does, also with fewer branches than ranks; the thinker has its own weights."""
    found, kept = [], []
    for dit in (DitConfig(use_hsdp=True, hsdp_shard_size=3), DitConfig()):
        stages = stages_of(other_checkpoint, ThinkerConfig(), dit)
        try:
            found.append([generate(stages, request) for request in (SMALL, MIXED[2])])
            layers = stages.dit._model.language_model.model.layers
            kept.append(sum((to_local(weight)).nbytes for weight in layers.parameters()))
        finally:
            stages.close()
    for ours, expected in zip(*found, strict=True):
        assert distance(ours.latents[0].tokens, expected.latents[0].tokens) < TOLERANCE
    assert kept[1] / 3 <= kept[0] < kept[1] / 2.9


def to_local(weight: Tensor) -> Tensor:
    return weight.to_local() if isinstance(weight, DTensor) else weight


@pytest.fixture(scope="module", params=[*MODES, *(pytest.param(mode, marks=pytest.mark.long) for mode in SLOW)])
def ranks(request: pytest.FixtureRequest, checkpoint_dir: Path) -> Iterator[LocalStages]:
    stages = stages_of(checkpoint_dir, *(MODES | SLOW)[request.param])
    yield stages
    stages.close()
    assert stages.producer.pool.blocks.used == 0


QUICK = ("t2i_default", "vqa")


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=case.name, marks=() if case.name in QUICK else pytest.mark.long) for case in CASES],
)
def test_two_ranks_give_what_is_recorded(ranks: LocalStages, case: Case) -> None:
    output = result_of(ranks.think(result_of(ranks.expand(case.request))))
    if output.job is None:
        assert [answer.content for answer in output.answers] == [case.text]
        return
    assert [answer.reasoning for answer in output.answers] == ([] if case.text is None else [case.text])
    expected = case.tensors()
    (latents,) = result_of(ranks.denoise(output.job))
    assert distance(latents.tokens, expected["latent"]) < TOLERANCE
    # The same request again is answered from cached prefixes.
    again = result_of(ranks.think(result_of(ranks.expand(case.request)))).job
    assert again is not None
    contexts = [claim(LocalConsumer(), handle) for handle in again.handles]
    for context in again.branches:
        kv = contexts[context.handle][:, :, :: case.kv_token_stride]
        if f"kv.{context.branch}.k" in expected:
            assert distance(kv[:, 0], expected[f"kv.{context.branch}.k"]) < TOLERANCE
            assert distance(kv[:, 1], expected[f"kv.{context.branch}.v"]) < TOLERANCE


def test_a_mixed_load_is_that_of_one_rank(ranks: LocalStages, checkpoint_dir: Path) -> None:
    check_mixed_load(ranks, checkpoint_dir)


def test_a_request_that_is_aborted_leaves_nothing(ranks: LocalStages) -> None:
    request = msgspec.structs.replace(MIXED[0], num_inference_steps=1000)
    _, job = think(ranks, request)
    plan = result_of(ranks.expand(msgspec.structs.replace(TEXT, max_tokens=4000, ignore_eos=True)))
    calls = [ranks.denoise(job), ranks.think(plan)]
    for call in calls:
        next(call.follow(lambda: False, 60))  # it has begun
    for request_id in (job.request_id, plan.request_id):
        ranks.abort(request_id)
    for call in calls:
        with pytest.raises(Cancelled):
            result_of(call)
    assert ranks.thinker.blocks_used == 0
    if ranks.dit.ranks is not None:
        assert ranks.dit.ranks.stores == 0
    generate(ranks, MIXED[2])  # the ranks are in step
