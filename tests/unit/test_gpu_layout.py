"""What a GPU runs, run here: all sequences in one call of the attention, and fewer, larger operations.

The kernels are torch's plain ones; page tables, lengths, layouts and the order of the rows are a GPU's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from bagel_triton.deploy.config import DeployConfig
from bagel_triton.engine.dit.steps import DeviceSteps
from bagel_triton.engine.dit.workspace import WorkspacePool
from bagel_triton.kv.store import PagedKeys
from bagel_triton.model.attention import AttentionKernel, QuerySpan, attend
from bagel_triton.model.autoencoder import decode, encode, sample
from bagel_triton.model.cuda.attention import KeySpan, call_of, grouped, numbers_of, varlen_attention
from bagel_triton.model.cuda.autoencoder import in_bfloat16
from bagel_triton.model.cuda.executor import CudaExecutor
from bagel_triton.model.cuda.graphs import DecodeInputs, GraphCache, filled
from bagel_triton.pipeline.local import LocalStages
from bagel_triton.protocol.errors import InvalidRequest
from bagel_triton.protocol.messages import KVGeometry
from bagel_triton.protocol.request import GenerationRequest
from bagel_triton.weights.checkpoint import Checkpoint
from tests.support.cases import Case, load_cases
from tests.support.lora import write_layers
from tests.support.nearness import relative_rms
from tests.support.runs import generate, generate_together, result_of, think

DATA = Path(__file__).parents[1] / "data"
CASES = load_cases(DATA / "cases-a")
RMS = 1e-3  # rounding of float32 over a whole flow


class Replayed:
    """A graph that computes its step anew from its inputs, into the same outputs."""

    def __init__(self, step: Callable[[], tuple[torch.Tensor, ...]]) -> None:
        self._step, self.graph = step, self
        self.outputs: tuple[torch.Tensor, ...] = ()
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        new = self._step()
        self.outputs = self.outputs or new
        for kept, one in zip(self.outputs, new, strict=True):
            kept.copy_(one)


def _captured(self: GraphCache[Any], key: Any, inputs: torch.Tensor) -> Replayed:
    return Replayed(lambda: self._step(key, inputs))


def _replays(cache: GraphCache[Any]) -> list[int]:
    """How often each key's graph has run."""
    return [met.graph.replays for met in cache._met.values() if isinstance(met.graph, Replayed)]


def config(**fields: Any) -> DeployConfig:
    return DeployConfig(str(DATA / "tiny-a"), device="cpu", dtype="float32", **fields)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_layers(tmp_path_factory.mktemp("adapter") / "style", seed=1, rank=4)


@pytest.fixture(scope="module")
def stages(adapter: str) -> Iterator[LocalStages]:
    """Engines that take the CPU for a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("model.device", "engine.thinker.prefill", "engine.dit.engine"):
            patch.setattr(f"bagel_triton.{module}.on_gpu", lambda device: True)
        flash = AttentionKernel("flash-2", "so steps are graphs")
        for module in ("engine.thinker.prefill", "engine.dit.steps"):
            patch.setattr(f"bagel_triton.{module}.attention_kernel", lambda device, dtype: flash)
        patch.setattr(GraphCache, "_capture", _captured)
        stages = LocalStages(config(lora_modules={"style": adapter}))
        steps, decode = stages.dit._steps, stages.thinker._prefiller._graphs
        assert isinstance(steps, DeviceSteps)
        assert isinstance(steps._forward, CudaExecutor)
        yield stages
        assert decode is not None
        assert steps._graphs is not None
        assert _replays(decode._cache)
        assert _replays(steps._graphs)
        stages.close()
    assert stages.producer.pool.blocks.used == 0
    assert steps.workspace.take([steps.workspace.slots]) is not None  # all came back


@pytest.mark.parametrize("case", [case for case in CASES if case.height], ids=lambda case: case.name)
def test_an_image_is_the_one_recorded(stages: LocalStages, case: Case) -> None:
    run = generate(stages, case.request)
    assert relative_rms(run.latents[0].tokens, case.tensors()["latent"]) < RMS


@pytest.mark.parametrize("case", [case for case in CASES if not case.height], ids=lambda case: case.name)
def test_a_text_is_the_one_recorded(stages: LocalStages, case: Case) -> None:
    (answer,) = result_of(stages.think(result_of(stages.expand(case.request)))).answers
    assert answer.content == case.text


def test_rows_of_an_adapter_are_those_of_merged_weights(stages: LocalStages, adapter: str) -> None:
    """Beside rows without one, in graphs of their own."""
    request, words = (next(case.request for case in CASES if case.name == name) for name in ("t2i_default", "chat"))
    styled, said = (msgspec.structs.replace(one, lora="style") for one in (request, words))
    both = generate_together(stages, [request, styled])
    (text,) = result_of(stages.think(result_of(stages.expand(said)))).answers
    steps, decode = stages.dit._steps, stages.thinker._prefiller._graphs
    assert isinstance(steps, DeviceSteps)
    for cache in (steps._graphs, decode and decode._cache):
        assert cache is not None
        graphs = [met.graph for key, met in cache._met.items() if key[-1]]
        assert any(isinstance(graph, Replayed) and graph.replays for graph in graphs)
    merged = LocalStages(config(lora_path=adapter))
    try:
        expected = [generate(stages, request), generate(merged, request)]
        (answer,) = result_of(merged.think(result_of(merged.expand(words)))).answers
    finally:
        merged.close()
    assert text.content == answer.content
    for run, other in zip(both, expected, strict=True):
        assert relative_rms(run.latents[0].tokens, other.latents[0].tokens) < RMS


def test_images_of_several_requests_share_a_forward(stages: LocalStages) -> None:
    """Two images of one request take the same slots, one after the other; other requests have their own workspaces."""
    requests = [
        GenerationRequest(prompt=prompt, height=side, width=96, seed=seed, num_inference_steps=5, n=1 + seed % 2)
        for seed, (prompt, side) in enumerate((("A cute cat", 96), ("A cat on a table", 64), ("A city " * 9, 96)))
    ]
    alone = [generate(stages, request) for request in requests]
    for ours, expected in zip(generate_together(stages, requests), alone, strict=True):
        for latents, before in zip(ours.latents, expected.latents, strict=True):
            assert relative_rms(latents.tokens, before.tokens) < RMS


def test_a_full_workspace_makes_a_request_wait_and_one_too_long_for_it_is_refused(stages: LocalStages) -> None:
    requests = [GenerationRequest("A cat", height=96, width=96, seed=seed, num_inference_steps=5) for seed in range(3)]
    alone = [generate(stages, request) for request in requests]
    steps = stages.dit._steps
    assert isinstance(steps, DeviceSteps)
    pool = steps.workspace
    plan, job = think(stages, requests[0])
    needed = sum(stages.dit._sizes(job))
    stages.thinker.abort(plan.request_id)
    held = pool.take([pool.slots - needed - 1])  # there is room for one at a time
    assert held is not None
    try:
        together = generate_together(stages, requests)
    finally:
        pool.give_back(held)
    for ours, expected in zip(together, alone, strict=True):
        assert torch.equal(ours.latents[0].tokens, expected.latents[0].tokens)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool, "slots", needed - 1)
        with pytest.raises(InvalidRequest, match=rf"{needed} slots .* has {needed - 1} for dit.max_num_seqs="):
            generate(stages, requests[0])


def test_a_workspace_gives_runs_that_fit_and_joins_what_comes_back() -> None:
    pool = WorkspacePool(KVGeometry(1, 1, 2, 16, "float32"), 10, torch.float32, torch.device("cpu"))
    first, second = pool.take([3, 4]) or [], pool.take([2]) or []
    assert (first, second) == ([slice(0, 3), slice(3, 7)], [slice(7, 9)])
    assert pool.take([1, 1]) is None
    pool.give_back(first)
    assert pool.take([8]) is None  # seven and one, apart
    pool.give_back(second)
    assert pool.take([10]) == [slice(0, 10)]


def test_texts_in_a_graph_with_rows_to_spare_are_those_of_one_alone(stages: LocalStages) -> None:
    """Three texts run in a graph of four; each has its own length and its own blocks."""

    def text(prompt: str, choices: int) -> list[str]:
        request = GenerationRequest(prompt=prompt, modality="text", max_tokens=24, n=choices)
        return [answer.content for answer in result_of(stages.think(result_of(stages.expand(request)))).answers]

    (alone,) = text("A cat on a table", 1)
    assert text("A cat on a table", 3) == [alone] * 3


def test_a_graphs_spare_rows_repeat_the_last_text_and_spare_blocks_are_the_first() -> None:
    inputs = DecodeInputs([7, 8], [3, 40], [19, 5], [4, 41], [0, 16], [1, 0, 2])
    assert filled(inputs, 3, 4) == [7, 8, 8, 3, 40, 40, 19, 5, 5, 1, 0, 2, 0, 0, 1, 2, 3, 0, 16, 16, 0, 4, 41, 41]


def _random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_spans_of_one_kind_are_one_call_and_a_single_row_is_of_both() -> None:
    whole, text = KeySpan(0, 4, 0, 9, causal=False), KeySpan(5, 9, 20, 7, causal=True)
    token = KeySpan(4, 5, 9, 5, causal=True)
    assert grouped([text, whole, token]) == [(whole, token), (text,)]
    assert grouped([token, text]) == [(token, text)]
    assert grouped([whole, text]) == [(whole,), (text,)]  # rows between them belong to nobody


@pytest.mark.parametrize("causal", [False, True])
def test_a_call_is_the_attention_of_each_span(causal: bool) -> None:
    """Keys need not ascend, and two spans may see the same."""
    query, key, value = _random(0, 9, 6, 16), _random(1, 40, 2, 16), _random(2, 40, 2, 16)
    (group,) = grouped([KeySpan(0, 4, 25, 9, causal), KeySpan(4, 5, 3, 14, causal), KeySpan(5, 9, 25, 9, causal)])
    call = call_of(group, torch.tensor(numbers_of(group), dtype=torch.int32))
    out = varlen_attention(query, key, value, call)
    for start, stop, first, length in ((0, 4, 25, 9), (4, 5, 3, 14), (5, 9, 25, 9)):
        seen = slice(first, first + length)
        assert torch.equal(out[start:stop], attend(query[start:stop], key[seen], value[seen], causal))


def test_keys_in_consecutive_blocks_are_read_in_place() -> None:
    spans = [QuerySpan(0, 1, 0, True), QuerySpan(1, 2, 1, True)]
    in_place = PagedKeys.of(spans, [([3, 4], 20), ([8], 5)], 16)
    assert in_place.blocks == []
    assert [(span.first_key, span.length) for span in in_place.spans] == [(48, 20), (128, 5)]
    scattered = PagedKeys.of(spans, [([3, 5], 20), ([8], 5)], 16)
    assert scattered.blocks == [3, 5, 8]
    assert [(span.first_key, span.length) for span in scattered.spans] == [(0, 20), (32, 5)]


def test_pixels_in_bfloat16_with_norms_in_float32_are_near_float32s() -> None:
    """The arithmetic of a GPU's decoder on CPU tensors, with the toy that draws."""
    checkpoint = Checkpoint(Path(__file__).parents[2] / "build" / "tiny_bagel" / "checkpoint")
    autoencoder = checkpoint.load_autoencoder(torch.device("cpu"), torch.float32)
    before = {name: weight.clone() for name, weight in autoencoder.state_dict().items()}
    with torch.inference_mode():
        half, half_encoder = in_bfloat16(autoencoder.decoder), in_bfloat16(autoencoder.encoder)
        ramp = torch.linspace(-1, 1, 128)
        for image in (
            _random(3, 128, 128, 3).clamp(-1, 1),
            torch.stack(torch.broadcast_tensors(ramp, ramp[:, None], ramp.flip(0)), -1),
        ):
            moments = encode(autoencoder, image)
            means, near_means = (
                one[:, : autoencoder.latent_channels]
                for one in (moments, encode(autoencoder, image, lambda x: half_encoder(x.to(torch.bfloat16)).float()))
            )
            assert relative_rms(near_means, means) < 0.02
            latent = sample(moments, torch.zeros_like(moments[:, : autoencoder.latent_channels]))
            exact = decode(autoencoder, latent).float()
            near = decode(autoencoder, latent, lambda z: half(z.to(torch.bfloat16)).float()).float()
            assert 10 * torch.log10(255**2 / (near - exact).square().mean()) > 50  # 56.3 and more, measured
    norms = [module for module in half.modules() if isinstance(module, torch.nn.GroupNorm)]
    assert {weight.dtype for norm in norms for weight in norm.parameters()} == {torch.float32}
    assert all(torch.equal(weight, before[name]) for name, weight in autoencoder.state_dict().items())
