"""Layers that stay in the host's memory: the same numbers, in as little memory as planned."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import torch
from torch import Tensor

from bagel_triton.deploy import yaml as deploy_yaml
from bagel_triton.deploy.config import ConfigError, DeployConfig, DitConfig, ThinkerConfig
from bagel_triton.model.bagel import Bagel
from bagel_triton.model.cpu.executor import CpuExecutor
from bagel_triton.model.cpu.thread_pool import SINGLE_THREAD
from bagel_triton.model.cuda.executor import CudaExecutor
from bagel_triton.model.device import Placement
from bagel_triton.model.offload import GIB, LayerOffload, offloaded
from bagel_triton.parallel.sizes import check
from bagel_triton.pipeline.local import LocalStages
from bagel_triton.protocol.request import GenerationRequest
from bagel_triton.serving import memory
from bagel_triton.serving.memory_plan import Available, MemoryPlan, plan
from bagel_triton.weights.checkpoint import Checkpoint
from tests.support.batches import make_batch, sequence
from tests.support.runs import generate, generate_together
from tests.unit.test_serving_flags import resolve

TINY = Path(__file__).parents[1] / "data" / "tiny-a"
CPU, GPU = torch.device("cpu"), Placement(torch.device("cuda"), torch.bfloat16)
IMAGES = [
    GenerationRequest(prompt=prompt, height=size, width=32, seed=1, num_inference_steps=3)
    for prompt, size in (("A cute cat", 32), ("A lighthouse", 48))
]


def load(form: str | None, offload_gb: float = 0.0) -> Bagel:
    return Checkpoint(TINY).load_bagel(CPU, torch.float32, None, form, offload_gb)


def layer_gb(form: str | None = None, dtype: torch.dtype = torch.float32) -> float:
    """GiB of one layer."""
    return Checkpoint(TINY).offloaded_bytes(dtype, form, 2**-30)[0] / GIB


@torch.inference_mode()
def hidden(bagel: Bagel, run: Callable[..., Tensor]) -> list[Tensor]:
    """Two forwards, of which the second finds the slots as the first left them."""
    images = [sequence(bagel, rows, 2, seed) for seed, rows in enumerate((25, 48))]
    found = []
    for chosen in (images, images[:1]):
        embeddings, batch, kv = make_batch(bagel, chosen)
        found.append(run(embeddings.clone(), batch, kv).clone())
    return found


@pytest.mark.parametrize("form", [None, "int8", "nf4"])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_every_executor_computes_the_same_bits(form: str | None, layers: int) -> None:
    plain, moved = load(form), load(form, layers * layer_gb(form))
    offload = moved.language_model.model.offload
    assert isinstance(offload, LayerOffload)
    for ahead in (False, True):
        offload.ahead = ahead  # as on a GPU, whose executor computes layer by layer
        executors: list[Callable[[Bagel], Callable[..., Tensor]]] = [
            lambda bagel: bagel.language_model.model,
            lambda bagel: CudaExecutor(bagel.language_model.model),
        ]
        if not ahead:
            executors.append(lambda bagel: CpuExecutor(bagel.language_model.model, SINGLE_THREAD))
        for executor in executors:
            for one, other in zip(hidden(moved, executor(moved)), hidden(plain, executor(plain)), strict=True):
                assert torch.equal(one, other)


@pytest.mark.parametrize("form", [None, "int8", "nf4"])
def test_memory_on_the_device_is_that_of_two_layers(form: str | None) -> None:
    checkpoint = Checkpoint(TINY)
    for layers in (1, 2, 3):
        moved = load(form, layers * layer_gb(form))
        storages = {tensor.untyped_storage().data_ptr(): tensor.nbytes for tensor in moved.state_dict().values()}
        host, slots = checkpoint.offloaded_bytes(torch.float32, form, layers * layer_gb(form))
        assert sum(storages.values()) == checkpoint.bagel_bytes(torch.float32, form) - host + slots


def test_layers_are_spread_over_all() -> None:
    assert offloaded(6, GIB, 0) == []
    assert offloaded(6, GIB, 2.5) == [1, 3, 5]
    assert offloaded(6, GIB, 2.0) == [2, 5]
    assert offloaded(6, GIB, 99) == [0, 1, 2, 3, 4, 5]


@pytest.fixture
def engines() -> Iterator[Callable[[float], LocalStages]]:
    running: list[LocalStages] = []

    def start(offload_gb: float) -> LocalStages:
        thinker = ThinkerConfig(kv_tokens=4096, cpu_offload_gb=offload_gb)
        config = DeployConfig(str(TINY), device="cpu", dtype="float32", thinker=thinker)
        running.append(LocalStages(config))
        return running[-1]

    yield start
    for stages in running:
        stages.close()


def test_engines_that_share_the_layers_draw_the_same_pixels(engines: Callable[[float], LocalStages]) -> None:
    """Thinker and DiT compute at the same time, and take turns in the slots."""
    plain, moved = engines(0.0), engines(1.0)
    expected = [generate(plain, request).pixels[0] for request in IMAGES]
    for _ in range(3):
        for run, pixels in zip(generate_together(moved, IMAGES), expected, strict=True):
            assert torch.equal(run.pixels[0], pixels)


@pytest.mark.parametrize(
    ("flags", "thinker", "dit"),
    [
        (["--cpu-offload-gb", "1.5"], 1.5, 1.5),
        (["--enable-layerwise-offload"], 1024, 1024),
        (["--no-enable-layerwise-offload"], 0, 0),
        (["--cpu-offload-gb", "1.5", "--stage-overrides", '{"1": {"cpu_offload_gb": 3}}'], 1.5, 3),
    ],
)
def test_flags_say_how_much(tmp_path: Path, flags: list[str], thinker: float, dit: float) -> None:
    config = resolve(tmp_path, *flags).config
    assert (config.thinker.cpu_offload_gb, config.dit.cpu_offload_gb) == (thinker, dit)


def test_a_file_has_it_by_stage(tmp_path: Path) -> None:
    path = tmp_path / "deploy.yaml"
    path.write_text("enable_layerwise_offload: true\nstages: [{stage_id: 1, enable_layerwise_offload: false}]\n")
    config = deploy_yaml.load(path, str(TINY))
    assert (config.thinker.cpu_offload_gb, config.dit.cpu_offload_gb) == (1024, 0)


def test_ranks_are_refused() -> None:
    dit = DitConfig(cfg_parallel_size=2, cpu_offload_gb=1)
    with pytest.raises(ConfigError, match="cfg_parallel_size=2 with cpu_offload_gb=1 is not supported"):
        check(DeployConfig(str(TINY), dit=dit), Checkpoint(TINY).config.language)


def planned(pipeline: str = "bagel_single_stage", placement: Placement = GPU, **stage: object) -> MemoryPlan:
    thinker, dit = ThinkerConfig(kv_tokens=64, **stage), DitConfig(max_num_seqs=1, **stage)  # type: ignore[arg-type]
    config = DeployConfig(str(TINY), pipeline=pipeline, thinker=thinker, dit=dit)
    return plan(Checkpoint(TINY), config, placement, 32, 32)


def test_the_plan_moves_layers_to_the_host_and_keeps_two() -> None:
    layer = round(layer_gb(dtype=torch.bfloat16) * GIB)
    whole, moved = planned(), planned(cpu_offload_gb=1.0)
    assert (whole.weights - moved.weights, moved.offloaded) == (layer, 3 * layer)
    assert whole.total - moved.total == layer
    apart = planned("bagel", cpu_offload_gb=1.0)  # each process copies from its own
    assert (apart.offloaded, apart.shares_weights) == (6 * layer, False)
    on_cpu = Placement(CPU, torch.float32)
    assert planned(placement=on_cpu, cpu_offload_gb=1.0).weights == planned(placement=on_cpu).weights + 4 * layer


def test_auto_offloads_as_few_layers_as_it_takes() -> None:
    checkpoint = Checkpoint(TINY)
    parts = {"thinker": ThinkerConfig(kv_tokens=64, quantization="auto"), "dit": DitConfig(1, quantization="auto")}
    config = msgspec.structs.replace(DeployConfig(str(TINY), pipeline="bagel_single_stage"), **parts)
    fits = [planned(quantization="nf4", cpu_offload_gb=layers * layer_gb("nf4", torch.bfloat16)) for layers in (0, 3)]
    for room, said in zip((fits[0].total, fits[1].total), ("nf4", "nf4, offloaded to the host"), strict=True):
        free = Available(host=GIB, shared=GIB, device=room, device_total=room)
        chosen, need, problem = memory._planned(checkpoint, config, GPU, (32, 32), free)
        assert problem is None
        assert need.total <= room
        assert memory.quantization_summary(checkpoint, chosen).startswith(said)
        assert (need.offloaded > 0) == ("offloaded" in said)
    free = Available(host=1, shared=GIB, device=fits[1].total, device_total=GIB)
    _, _, problem = memory._planned(checkpoint, config, GPU, (32, 32), free)
    assert "the weights that are offloaded need" in str(problem)
