"""Adapters that requests choose are the merged weights, in a batch of any others, and leave those as they are."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest
import torch
from torch import Tensor, nn

from bagel_triton.deploy.config import DeployConfig
from bagel_triton.engine.build import Models, StageResources
from bagel_triton.model.config import CheckpointError
from bagel_triton.model.quantization import QuantizedLinear
from bagel_triton.pipeline.local import LocalStages
from bagel_triton.protocol.errors import ModelNotFound
from bagel_triton.protocol.request import GenerationRequest
from bagel_triton.telemetry.metrics import NoMetrics
from bagel_triton.weights.adapters import load_adapter
from bagel_triton.weights.checkpoint import inspect
from tests.support.cases import load_cases
from tests.support.exact import assert_same
from tests.support.lora import write_layers
from tests.support.runs import generate, generate_together, result_of
from tests.unit.test_lora import write_adapter

CHECKPOINT = Path(__file__).parents[1] / "data" / "tiny-a"
CASES = {case.name: case for case in load_cases(CHECKPOINT.parent / "cases-a")}
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("adapters")
    return {
        "style": write_layers(folder / "style", seed=1, rank=4),
        "short": write_layers(folder / "short", seed=2, rank=3, projections=("self_attn.q_proj{}", "mlp{}.down_proj")),
    }


def config(**fields: object) -> DeployConfig:
    return msgspec.structs.replace(DeployConfig(str(CHECKPOINT), device="cpu", dtype="float32"), **fields)


class Hits(NoMetrics):
    """Counts the tokens of prefixes that were reused."""

    tokens = 0.0

    def count(self, name: str, amount: float = 1, **labels: str) -> None:
        self.tokens += amount if name == "thinker_prefix_hit_tokens" else 0


@pytest.fixture(scope="module")
def stages(adapters: dict[str, str]) -> Iterator[LocalStages]:
    stages = LocalStages(config(lora_modules=adapters), Hits())
    yield stages
    stages.close()
    assert stages.producer.pool.blocks.used == 0


@pytest.fixture(scope="module", params=["style", "short"])
def merged(adapters: dict[str, str], request: pytest.FixtureRequest) -> Iterator[tuple[str, LocalStages]]:
    """An adapter's name, and stages with it merged into their weights."""
    stages = LocalStages(config(lora_path=adapters[request.param]))
    yield request.param, stages
    stages.close()


def chosen(request: GenerationRequest, name: str | None) -> GenerationRequest:
    return msgspec.structs.replace(request, lora=name)


def distance(ours: Tensor, expected: Tensor) -> float:
    return float((ours.double() - expected.double()).abs().max() / expected.double().abs().max())


def text(stages: LocalStages, request: GenerationRequest) -> tuple[str, str]:
    (answer,) = result_of(stages.think(result_of(stages.expand(request)))).answers
    return answer.reasoning, answer.content


@pytest.mark.parametrize(
    "name",
    [
        "t2i_default",
        "t2i_think",
        "t2i_taylorseer_interval",
        pytest.param("edit_wide", marks=pytest.mark.long),
    ],
)
def test_an_image_is_that_of_merged_weights(stages: LocalStages, merged: tuple[str, LocalStages], name: str) -> None:
    adapter, other = merged
    request = CASES[name].request
    base = generate(stages, request)  # its prefixes are cached, and must not be the adapter's
    run = generate(stages, chosen(request, adapter))
    expected = generate(other, request).latents[0].tokens
    assert distance(run.latents[0].tokens, expected) < TOLERANCE
    assert distance(base.latents[0].tokens, expected) > 100 * TOLERANCE
    assert distance(base.latents[0].tokens, CASES[name].tensors()["latent"]) < TOLERANCE


@pytest.mark.parametrize("name", ["vqa_think", "chat"])
def test_a_text_is_that_of_merged_weights(stages: LocalStages, merged: tuple[str, LocalStages], name: str) -> None:
    adapter, other = merged
    request = CASES[name].request
    base = text(stages, request)
    assert text(stages, chosen(request, adapter)) == text(other, request) != base


def test_requests_of_several_adapters_share_batches(stages: LocalStages) -> None:
    """Each has the bits that it has alone; those without an adapter have them in a server without any."""
    images = [
        chosen(CASES[name].request, adapter)
        for name in ("t2i_channel_renorm", "t2i_no_cfg")
        for adapter in (None, "style", "short")
    ]
    texts = [chosen(CASES["chat"].request, adapter) for adapter in ("style", None, "short", None)]
    with ThreadPoolExecutor(len(texts)) as pool:
        answers = [pool.submit(text, stages, request) for request in texts]
        together = generate_together(stages, images)
        found = [answer.result() for answer in answers]
    for request, run in zip(images, together, strict=True):
        assert_same(run.latents[0].tokens, generate(stages, request).latents[0].tokens, request.lora)
    assert found == [text(stages, request) for request in texts]
    plain = LocalStages(config())
    try:
        for request, run in list(zip(images, together, strict=True))[::3]:
            assert request.lora is None
            assert_same(run.latents[0].tokens, generate(plain, request).latents[0].tokens)
    finally:
        plain.close()


def test_a_prefix_is_reused_by_requests_of_its_adapter_alone(stages: LocalStages) -> None:
    request = GenerationRequest(prompt="a prefix of its own", modality="text", max_tokens=2)

    metrics = stages.thinker.metrics
    assert isinstance(metrics, Hits)

    def hits(name: str | None) -> float:
        before = metrics.tokens
        text(stages, chosen(request, name))
        return metrics.tokens - before

    assert [hits(name) for name in (None, "style", "short")] == [0, 0, 0]
    assert all(hits(name) for name in (None, "style", "short"))


@pytest.mark.parametrize("form", ["int8", "int8_w8a8", "nf4"])
def test_an_adapter_adds_to_quantised_weights(adapters: dict[str, str], form: str) -> None:
    """The expected image is that of the decoded weights with the update added, for forms that round no activations."""
    quantised = config(lora_modules=adapters, thinker=msgspec.structs.replace(config().thinker, quantization=form))
    request = chosen(CASES["t2i_default"].request, "style")
    models = Models.load(StageResources.open(quantised))
    updates = load_adapter("style", adapters["style"], models.config.language, torch.device("cpu"), torch.float32)
    stages = LocalStages(quantised, models=models)
    try:
        ours, base = (generate(stages, one).latents[0].tokens for one in (request, chosen(request, None)))
    finally:
        stages.close()
    assert distance(ours, base) > 100 * TOLERANCE
    if form.endswith("w8a8"):
        return
    sizes = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "o_proj": ("o_proj",), "down_proj": ("down_proj",)}
    for name, layer in list(models.bagel.language_model.model.named_modules()):
        if isinstance(layer, QuantizedLinear):
            _, number, expert, *_, last = name.split(".")
            projections = sizes.get(last, ("gate_proj", "up_proj"))
            added = [updates.layers[int(number)][expert == "gen", projection] for projection in projections]
            dense = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
            weight = layer.dense(torch.float32) + torch.cat([update.up @ update.down for update in added])
            dense.weight, dense.bias = nn.Parameter(weight, requires_grad=False), layer.bias
            models.bagel.language_model.model.set_submodule(name, dense)
    stages = LocalStages(config(), models=models)
    try:
        assert distance(ours, generate(stages, chosen(request, None)).latents[0].tokens) < TOLERANCE
    finally:
        stages.close()


def test_an_unknown_adapter_is_an_unknown_model(stages: LocalStages) -> None:
    request = CASES["t2i_no_cfg"].request
    with pytest.raises(ModelNotFound, match="lora='styl' is not allowed; allowed: style, short"):
        stages.planner.expand(chosen(request, "styl"))
    plan = msgspec.structs.replace(stages.planner.expand(request), lora="styl")
    with pytest.raises(ModelNotFound, match="lora='styl'"):
        result_of(stages.think(plan))


def test_an_adapter_of_other_modules_can_only_be_merged(tmp_path: Path) -> None:
    folder, _ = write_adapter(tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"adapts connector\.fc2, which an adapter of requests cannot; allowed: "):
        load_adapter("x", folder, inspect(CHECKPOINT).language, torch.device("cpu"), torch.float32)
