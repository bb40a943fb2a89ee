"""Quantised weights: their numbers, that rows stay independent of their batch, and what loading makes of them."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import torch
from torch import Tensor

from bagel_triton.deploy import vocabulary
from bagel_triton.deploy.config import DeployConfig, DitConfig, ThinkerConfig
from bagel_triton.model.bagel import Bagel
from bagel_triton.model.cpu.executor import CpuExecutor
from bagel_triton.model.cpu.thread_pool import SINGLE_THREAD
from bagel_triton.model.cuda.executor import CudaExecutor
from bagel_triton.model.device import Placement
from bagel_triton.model.quantization import CODEBOOKS, FORMS, Form, QuantizedLinear
from bagel_triton.pipeline.local import LocalStages
from bagel_triton.pipeline.offline import run_batch
from bagel_triton.pipeline.pipeline import GeneratedImage
from bagel_triton.protocol.errors import BagelError
from bagel_triton.protocol.events import AnswerEvent
from bagel_triton.protocol.request import GenerationRequest
from bagel_triton.serving import CommandError, memory
from bagel_triton.serving.memory_plan import Available, plan
from bagel_triton.weights import layout
from bagel_triton.weights.checkpoint import Checkpoint
from bagel_triton.weights.sharing import WeightStore
from tests.support.batches import make_batch, sequence
from tests.support.exact import assert_same

CPU = torch.device("cpu")
TINY = Path(__file__).parents[1] / "data" / "tiny-a"
ERRORS = {"int8": 0.007, "fp8": 0.027, "int4": 0.1, "nf4": 0.09}  # relative, of weights of a normal distribution
every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


def load(form: str | None, directory: Path = TINY, shared: WeightStore | None = None) -> Bagel:
    return Checkpoint(directory).load_bagel(CPU, torch.float32, shared, form)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_a_deploy_file_may_name_every_form() -> None:
    assert ("auto", *FORMS) == vocabulary.QUANTIZATIONS


@every_form
def test_codes_are_the_nearest_of_the_weights(form: Form) -> None:
    weight = normal(48, 160)
    weight[5] = 0
    codes, scale = form.encode(weight)
    dense = form.decode(codes, scale)
    assert (dense - weight).norm() / weight.norm() < ERRORS[form.storage]
    assert not dense[5].any()
    assert (codes.dtype, scale.dtype) == tuple(dtype for _, dtype in form.tensors(48, 160).values())
    stored = codes.nbytes + scale.nbytes
    assert stored == 48 * (160 * form.bits // 8 + (160 // 32 * 2 if form.bits == 4 else 4))
    if form.storage in CODEBOOKS:  # no other level would have been nearer
        groups = scale.float().unsqueeze(-1)
        levels = torch.tensor(CODEBOOKS[form.storage]) * groups.unsqueeze(-1)
        distances = (weight.view(48, 5, 32, 1) - levels.view(48, 5, 1, 16)).abs().amin(-1)
        torch.testing.assert_close((dense - weight).abs().view(48, 5, 32), distances)


def test_float8_is_decoded_as_torch_does() -> None:
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    numbers = every[~every.float().isnan()]
    assert torch.equal(FORMS["fp8"].codes(numbers, torch.float32), numbers.float())


@pytest.mark.parametrize(
    ("form", "config"), [("int8", "Int8WeightOnlyConfig"), ("fp8", "Float8WeightOnlyConfig")], ids=["int8", "fp8"]
)
def test_the_numbers_are_torchaos(form: str, config: str) -> None:
    torchao = pytest.importorskip("torchao.quantization")
    weight = normal(768, 512)  # some numbers are half-way between two codes
    plain = torch.nn.Linear(512, 768, bias=False)
    plain.weight.data = weight.clone()
    torchao.quantize_(plain, getattr(torchao, config)())
    codes, scale = FORMS[form].encode(weight)
    assert torch.equal(codes.view(torch.uint8), plain.weight.qdata.view(torch.uint8))
    torch.testing.assert_close(scale, plain.weight.scale.view(-1, 1))


@every_form
@torch.inference_mode()
def test_both_executors_compute_what_the_plain_forward_does_and_rows_keep_to_themselves(form: Form) -> None:
    bagel = load(form.name)
    transformer = bagel.language_model.model
    assert isinstance(transformer.get_submodule("layers.0.gen.mlp.down_proj"), QuantizedLinear)
    images = [sequence(bagel, rows, 2, seed) for seed, rows in enumerate((25, 48, 7))]

    def hidden(executor: object, *chosen: int) -> list[Tensor]:
        embeddings, batch, kv = make_batch(bagel, [images[number] for number in chosen])
        found = executor(embeddings.clone(), batch, kv)  # type: ignore[operator]
        return list(found[: batch.gen_rows].split([len(images[number].gen) for number in chosen]))

    together = hidden(CpuExecutor(transformer, SINGLE_THREAD), 0, 1, 2)
    for number, image in enumerate(together):
        assert_same(image, hidden(CpuExecutor(transformer, SINGLE_THREAD), number)[0], number)
    # Activations that are rounded may fall to either side, one in thousands does.
    bound = 5e-2 if form.activations else 5e-6
    for executor in (transformer, CudaExecutor(transformer)):
        for image, other in zip(together, hidden(executor, 0, 1, 2), strict=True):
            assert (image - other).norm() < bound * other.norm()


@every_form
def test_stages_share_quantised_weights_and_compute_what_they_decode_to(form: Form, tmp_path: Path) -> None:
    private, shared = load(form.name), load(form.name, shared=WeightStore("test", tmp_path))
    assert len([*tmp_path.glob("test_weights_*")]) == 1
    plain = load(None).state_dict()
    for name, tensor in private.state_dict().items():
        assert torch.equal(tensor.view(torch.uint8), shared.state_dict()[name].view(torch.uint8)), name
        layer = private.get_submodule(name.rpartition(".")[0])
        if isinstance(layer, QuantizedLinear) and name.endswith(".weight"):
            expected = form.decode(*form.encode(plain[name]))
            assert torch.equal(layer.dense(torch.float32), expected), name


def test_forms_of_one_size_have_files_of_their_own(tmp_path: Path) -> None:
    kept = [load(form, shared=WeightStore("test", tmp_path)) for form in ("int4", "nf4", "int8", "int8_w8a8")]
    assert len([*tmp_path.glob("test_weights_*")]) == 3  # the last two store the same
    assert not torch.equal(*(one.state_dict()["language_model.model.layers.0.gen.o_proj.weight"] for one in kept[:2]))


def test_a_weight_is_quantised_a_few_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = load("nf4").state_dict()
    monkeypatch.setattr(layout, "AT_ONCE", 700)
    seen: list[int] = []
    encode = Form.encode

    def watched(self: Form, weight: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(weight.numel())
        return encode(self, weight)

    monkeypatch.setattr(Form, "encode", watched)
    pieces = load("nf4").state_dict()
    assert max(seen) <= 700
    assert all(torch.equal(usual[name], tensor) for name, tensor in pieces.items())


@every_form
def test_a_request_gets_in_a_batch_what_it_gets_alone(form: Form) -> None:
    stage = {"thinker": ThinkerConfig(quantization=form.name, kv_tokens=2048)}  # type: ignore[arg-type]
    stages = LocalStages(msgspec.structs.replace(DeployConfig(str(TINY), device="cpu"), **stage))
    requests = [
        GenerationRequest(prompt="A cute cat", modality="image", height=64, width=64, seed=1, num_inference_steps=3),
        GenerationRequest(prompt="A cute cat", modality="text", max_tokens=8),
        GenerationRequest(prompt="dog", modality="image", height=32, width=96, seed=2, num_inference_steps=4),
    ]
    try:
        together = made(stages, requests)
        for number, request in enumerate(requests):
            (alone,) = made(stages, [request])
            if isinstance(alone, Tensor) and isinstance(other := together[number], Tensor):
                assert_same(alone, other, number)
            else:
                assert alone == together[number]
    finally:
        stages.close()


def made(stages: LocalStages, requests: list[GenerationRequest]) -> list[Tensor | str]:
    """The image, or the answer, to each request."""
    found: dict[int, Tensor | str] = {}
    for index, item in run_batch(stages, requests, 60.0, len(requests)):
        assert not isinstance(item, BagelError), item
        if isinstance(item, GeneratedImage):
            found[index] = torch.as_tensor(item.pixels)
        elif isinstance(item, AnswerEvent):
            found[index] = item.content
    return [found[index] for index in range(len(requests))]


# --- the memory they take ---


def test_the_plan_counts_what_is_loaded() -> None:
    def planned(thinker: str | None, dit: str | None) -> tuple[int, int, int, int]:
        stages = {"thinker": ThinkerConfig(quantization=thinker), "dit": DitConfig(quantization=dit)}  # type: ignore
        config = msgspec.structs.replace(DeployConfig(str(TINY)), **stages)
        need = plan(Checkpoint(TINY), config, Placement(CPU, torch.float32), 64, 64)
        weights = [stage.weights for stage in need.stages]
        return weights[0] - weights[2], weights[1], need.weights - weights[2], need.shared - need.stages[0].kv

    sizes = {form: sum(tensor.nbytes for tensor in load(form).state_dict().values()) for form in (None, "int8", "nf4")}
    for form, size in sizes.items():
        assert planned(form, form) == (size, size, size, size)
    both = sizes["int8"] + sizes["nf4"]
    assert planned("int8", "nf4") == (sizes["int8"], sizes["nf4"], both, both)
    assert planned("int8", "int8_w8a8")[2] == sizes["int8"]


@pytest.mark.parametrize("chosen", [None, "int8", "nf4", "nothing"])
def test_auto_takes_the_first_form_that_fits(monkeypatch: pytest.MonkeyPatch, chosen: str | None) -> None:
    auto = {"thinker": ThinkerConfig(kv_tokens=64, quantization="auto"), "dit": DitConfig(quantization="auto")}
    config = msgspec.structs.replace(DeployConfig(str(TINY), device="cpu", pipeline="bagel_single_stage"), **auto)

    def needed(form: str | None) -> int:
        stages = memory._quantized(config, form)  # type: ignore[arg-type]
        return plan(Checkpoint(TINY), stages, Placement(CPU, torch.float32), 512, 512).total

    room = needed("nf4") - 1 if chosen == "nothing" else needed(chosen)
    monkeypatch.setattr(memory, "available", lambda placement: Available(room, 2**40))
    if chosen == "nothing":
        with pytest.raises(CommandError, match="the stages need"):
            memory.require(config)
    else:
        found = memory.require(config)
        assert (found.thinker.quantization, found.dit.quantization) == (chosen, chosen)
