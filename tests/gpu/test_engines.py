"""Every stage on a GPU, in one process: near what was recorded on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bagel_triton.deploy.config import DeployConfig, ThinkerConfig
from bagel_triton.model.attention import attend
from bagel_triton.model.cuda.attention import KeySpan, call_of, grouped, numbers_of, varlen_attention
from bagel_triton.pipeline.local import LocalStages
from bagel_triton.protocol.request import GenerationRequest
from tests.support.cases import Case, load_cases
from tests.support.nearness import mean_levels, relative_rms
from tests.support.runs import generate, generate_together, result_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="these are a GPU's numbers; there is none here"),
]
GPU = torch.device("cuda:0")
DATA = Path(__file__).parents[1] / "data"
CASES = load_cases(DATA / "cases-a")
# Several times what rounding makes of these cases: convolutions compute in TF32, whatever the dtype.
RMS = {"float32": 0.01, "bfloat16": 0.1}
LEVELS = {"float32": 1.0, "bfloat16": 4.0}


@pytest.fixture(scope="module", params=["bfloat16", "float32"])  # that which is served comes first
def dtype(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def stages(dtype: str) -> Iterator[LocalStages]:
    stages = LocalStages(DeployConfig(str(DATA / "tiny-a"), device=str(GPU), dtype=dtype))  # type: ignore[arg-type]
    yield stages
    stages.close()
    assert stages.producer.pool.blocks.used == 0


@pytest.mark.parametrize("case", [case for case in CASES if case.height], ids=lambda case: case.name)
def test_an_image_is_near_the_one_recorded(stages: LocalStages, dtype: str, case: Case) -> None:
    run = generate(stages, case.request)
    assert run.latents[0].tokens.device == stages.producer.pool.store.device == GPU
    assert relative_rms(run.latents[0].tokens, case.tensors()["latent"]) < RMS[dtype]
    assert mean_levels(run.pixels[0], case.image()) < LEVELS[dtype]


@pytest.mark.parametrize("case", [case for case in CASES if not case.height], ids=lambda case: case.name)
def test_a_text_is_the_one_recorded(stages: LocalStages, dtype: str, case: Case) -> None:
    (answer,) = result_of(stages.think(result_of(stages.expand(case.request)))).answers
    assert answer.tokens > 0
    if dtype == "float32":  # bfloat16 may choose another of two tokens that are about as likely
        assert answer.content == case.text


@pytest.mark.parametrize("offload_gb", [2**-30, 1.0], ids=["one-layer", "all-layers"])
def test_offloaded_layers_draw_what_was_recorded(dtype: str, offload_gb: float) -> None:
    """Thinker and DiT take turns in the slots, while the next layer is copied."""
    thinker = ThinkerConfig(cpu_offload_gb=offload_gb)
    config = DeployConfig(str(DATA / "tiny-a"), device=str(GPU), dtype=dtype, thinker=thinker)  # type: ignore[arg-type]
    stages = LocalStages(config)
    try:
        cases = [case for case in CASES if case.height][:3]
        for case in cases:
            assert relative_rms(generate(stages, case.request).latents[0].tokens, case.tensors()["latent"]) < RMS[dtype]
        alone = [generate(stages, case.request) for case in cases]
        for ours, expected in zip(generate_together(stages, [case.request for case in cases]), alone, strict=True):
            assert relative_rms(ours.latents[0].tokens, expected.latents[0].tokens) < RMS[dtype]
    finally:
        stages.close()


def test_a_text_is_sampled_from_its_seed(stages: LocalStages) -> None:
    request = GenerationRequest(
        prompt="A cat", modality="text", max_tokens=20, temperature=1.0, top_k=50, repetition_penalty=1.2, seed=3, n=2
    )
    first, again = (result_of(stages.think(result_of(stages.expand(request)))).answers for _ in range(2))
    assert [answer.content for answer in first] == [answer.content for answer in again]
    assert first[0].content != first[1].content


def test_images_made_together_are_near_those_made_alone(stages: LocalStages, dtype: str) -> None:
    """They share forwards, decodings, and a pool whose blocks are not consecutive by then."""
    prompts = ("A cute cat", "A cute cat that sits on a table", "A futuristic city " * 9)
    requests = [
        GenerationRequest(prompt=prompt, height=side, width=96, seed=seed, num_inference_steps=6, n=1 + seed % 2)
        for seed, (prompt, side) in enumerate(zip(prompts * 2, (96, 96, 96, 64, 96, 176), strict=True))
    ]
    alone = [generate(stages, request) for request in requests]
    for ours, expected in zip(generate_together(stages, requests), alone, strict=True):
        for latents, before in zip(ours.latents, expected.latents, strict=True):
            assert relative_rms(latents.tokens, before.tokens) < RMS[dtype]
        for pixels, before_it in zip(ours.pixels, expected.pixels, strict=True):
            assert mean_levels(pixels, before_it) < LEVELS[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("rows", "length", "causal"),
    [(512, 512, True), (512, 2000, True), (1, 2000, True), (1024, 1300, False), (2, 1300, False)],
)
def test_attention_is_the_cpus(dtype: torch.dtype, rows: int, length: int, causal: bool) -> None:
    generator = torch.Generator().manual_seed(rows)
    query = torch.randn(rows, 28, 128, generator=generator)
    key, value = (torch.randn(length, 4, 128, generator=generator) for _ in range(2))
    expected = attend(query, key, value, causal)
    ours = attend(query.to(GPU, dtype), key.to(GPU, dtype), value.to(GPU, dtype), causal)
    assert ours.dtype == dtype
    assert relative_rms(ours, expected) < (1e-4 if dtype == torch.float32 else 0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_all_sequences_in_one_call_are_the_cpus(dtype: torch.dtype) -> None:
    """The keys of later spans come first, two spans see the same keys, and a row alone is among them."""
    spans = [
        KeySpan(0, 300, 900, 300, causal=True),
        KeySpan(300, 301, 100, 700, causal=True),
        KeySpan(301, 500, 900, 300, causal=True),
        KeySpan(500, 540, 0, 90, causal=True),
    ]
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(540, 28, 128, generator=generator)
    key, value = (torch.randn(1200, 4, 128, generator=generator) for _ in range(2))
    (group,) = grouped(spans)
    numbers = torch.tensor(numbers_of(group), dtype=torch.int32)
    expected = varlen_attention(query, key, value, call_of(group, numbers))
    ours = varlen_attention(*(x.to(GPU, dtype) for x in (query, key, value)), call_of(group, numbers.to(GPU)))
    assert relative_rms(ours, expected) < (1e-4 if dtype == torch.float32 else 0.02)
