"""What a configuration will take is what it takes, and what does not fit is refused with numbers."""

from __future__ import annotations

import io
from pathlib import Path

import msgspec
import pytest
import torch
from PIL import Image

from bagel_triton.deploy.config import DeployConfig, DitConfig, MooncakeStoreConfig, ThinkerConfig
from bagel_triton.engine.dit import workspace
from bagel_triton.engine.preprocess.planner import RequestPlanner
from bagel_triton.model.bagel import Bagel
from bagel_triton.model.config import segment_tokens
from bagel_triton.model.device import Placement
from bagel_triton.pipeline.local import LocalStages
from bagel_triton.protocol.request import GenerationRequest
from bagel_triton.serving import memory_plan as memory
from bagel_triton.serving import stage_memory
from bagel_triton.serving.memory_plan import Available, NotEnoughMemory
from bagel_triton.weights.adapters import adapter_bytes
from bagel_triton.weights.checkpoint import Checkpoint
from bagel_triton.weights.tiny import checkpoint as tiny_checkpoint
from bagel_triton.weights.tiny.config import TinyConfig
from bench import gpu_sizes
from bench.gpu import PUBLISHED
from tests.support.lora import write_layers

CHECKPOINT = Path(__file__).parents[1] / "data" / "tiny-a"
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
FLOAT32, BFLOAT16 = Placement(CPU, torch.float32), Placement(CPU, torch.bfloat16)
GIB = 2**30
QUANTISE = "quantise the weights (quantization: auto)"
PACKED = 2 * 3 * 2 * (96 + 32 + 32) * (96 + 1)  # queries, keys, values: bfloat16, 3 layers, 2 experts, with bias


def config_of(checkpoint: Path, **changes: object) -> DeployConfig:
    return msgspec.structs.replace(DeployConfig(str(checkpoint), device="cpu", dtype="float32"), **changes)


def plan_of(
    checkpoint: Path = CHECKPOINT,
    placement: Placement = FLOAT32,
    side: int = 64,
    shares_weights: bool = True,
    **changes: object,
) -> memory.MemoryPlan:
    config = config_of(checkpoint, **changes)
    return memory.plan(Checkpoint(checkpoint), config, placement, side, side, shares_weights)


def loaded_bytes(module: torch.nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in module.state_dict().values())


def test_a_token_of_the_published_model_takes_57344_bytes():
    assert stage_memory.kv_token_bytes(PUBLISHED.language, "bfloat16") == 57_344


def test_the_published_weights_take_what_their_file_does():
    with torch.device("meta"):
        transformer = Bagel(PUBLISHED).to(torch.bfloat16)
    assert stage_memory.module_bytes(transformer) == pytest.approx(29.2e9, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_those_that_are_loaded(tmp_path: Path, dtype: torch.dtype):
    tiny_checkpoint.write(
        tmp_path / "other", TinyConfig(hidden_size=80, heads=8, kv_heads=1, vae_channels=64, shards=3)
    )
    for directory in (CHECKPOINT, tmp_path / "other"):
        checkpoint = Checkpoint(directory)
        transformer = loaded_bytes(checkpoint.load_bagel(CPU, dtype))
        autoencoder = loaded_bytes(checkpoint.load_autoencoder(CPU, torch.float32))
        thinker, dit, vae_decode = plan_of(directory, Placement(CPU, dtype)).stages
        assert (thinker.stage, thinker.weights) == ("thinker", transformer + autoencoder)
        assert (dit.stage, dit.weights) == ("dit", transformer)
        assert (vae_decode.stage, vae_decode.weights) == ("vae_decode", autoencoder)


def test_weights_are_counted_as_often_as_they_are_in_memory():
    transformer, autoencoder = plan_of().stages[1].weights, plan_of().stages[2].weights
    # float32 is converted from the stored bfloat16 once, in shared memory; the autoencoder is stored in float32.
    assert plan_of().weights == transformer + autoencoder
    assert plan_of().shared == plan_of().stages[0].kv + transformer
    assert plan_of(placement=BFLOAT16).weights == transformer // 2 + autoencoder
    on_gpu = Placement(CUDA, torch.float32)
    assert plan_of(placement=on_gpu).weights == transformer + autoencoder
    assert plan_of(placement=on_gpu).shared == 0
    private = plan_of(placement=on_gpu, shares_weights=False)
    assert (private.weights, private.shared) == (2 * transformer + 2 * autoencoder, 0)
    for shares in (True, False):
        assert plan_of(pipeline="bagel_single_stage", shares_weights=shares).weights == transformer + autoencoder


def test_the_pool_is_the_one_that_is_made():
    thinker = ThinkerConfig(kv_tokens=1000, block_tokens=16)  # 63 blocks
    need = plan_of(thinker=thinker, pipeline="bagel_single_stage")
    stages = LocalStages(config_of(CHECKPOINT, thinker=thinker))
    assert need.stages[0].kv == stages.producer.pool.store.nbytes == 63 * 16 * need.kv_token
    stages.close()
    assert need.shared == 0
    assert plan_of(thinker=thinker, placement=BFLOAT16).shared == need.stages[0].kv // 2 + PACKED


def test_ranks_of_the_thinker_keep_their_heads_of_the_pool():
    """On a CPU all of them; of GPUs the first one's is what the plan is of, which also has a part of the layers."""
    ranked = {"thinker": ThinkerConfig(tensor_parallel_size=2), "dit": DitConfig(tensor_parallel_size=2)}
    alone, ranks = plan_of().stages[0], plan_of(**ranked).stages[0]
    assert ranks.kv * 2 == alone.kv * 3
    gpu = Placement(torch.device("cuda:0"), torch.bfloat16)
    alone, ranks = (plan_of(placement=gpu, **changes).stages[0] for changes in ({}, ranked))
    assert ranks.kv == alone.kv
    assert ranks.weights < alone.weights


def test_the_ranks_of_one_process_keep_their_heads_of_the_pool():
    """The thinker's are those of the DiT: six ranks of two KV heads, each with one of them."""
    ranked = {
        "pipeline": "bagel_single_stage",
        "thinker": ThinkerConfig(tensor_parallel_size=2),
        "dit": DitConfig(tensor_parallel_size=2, ulysses_degree=3),
    }
    assert plan_of(**ranked).stages[0].kv * 2 == plan_of().stages[0].kv * 7


def test_shared_memory_holds_the_pool_of_shm_alone():
    shared = plan_of(placement=BFLOAT16)
    assert shared.shared == shared.stages[0].kv + PACKED
    for options, rest in (({"connector": "mooncake"}, PACKED), ({"placement": Placement(CUDA, torch.bfloat16)}, 0)):
        need = plan_of(**{"placement": BFLOAT16, **options})
        assert (need.shared, need.stages[0].kv) == (rest, shared.stages[0].kv)


def test_what_the_thinker_lends_a_store_is_counted():
    pool = plan_of(connector="mooncake").stages[0].kv
    assert plan_of(connector="mooncake_store").stages[0].kv == pool + pool * 5 // 4
    store = MooncakeStoreConfig(segment=12345)
    assert plan_of(connector="mooncake_store", mooncake_store=store).stages[0].kv == pool + 12345


def test_what_mooncake_lends_of_a_gpus_pool_is_in_the_hosts_memory():
    alone = plan_of(placement=GPU)
    pool = alone.stages[0].kv
    assert pool == 12 << 20
    for connector, lent in (("mooncake", 16 << 20), ("mooncake_store", pool * 5 // 4)):  # pinned: a power of two
        need = plan_of(placement=GPU, connector=connector)
        assert (need.total, need.lent) == (alone.total, lent)
        available = Available(host=need.lent, shared=GIB, device=need.total)
        memory.check(need, config_of(CHECKPOINT, connector=connector), GPU, available)
        little = Available(host=need.lent - 1, shared=GIB, device=need.total)
        message = refusal(need, little, GPU, connector=connector)
        assert f"that {connector} lends from the host's memory need {memory.readable(need.lent)}" in message
        assert plan_of(placement=GPU, connector=connector, stage_id=1, addresses={1: ("10.0.0.2:1",)}).lent == 0


@pytest.mark.parametrize(("height", "width"), [(512, 512), (1024, 512), (64, 128)])
def test_contexts_are_those_of_an_edit(height: int, width: int):
    config = config_of(CHECKPOINT)
    image = io.BytesIO()
    Image.new("RGB", (width, height)).save(image, "PNG")
    request = GenerationRequest(prompt="Make it night", image=(image.getvalue(),))
    branches = RequestPlanner.open(config).expand(request).branches
    model = Checkpoint(CHECKPOINT).config
    gen, cfg_text, cfg_img = (sum(segment_tokens(part, model) for part in branch.segments) for branch in branches)
    longer = workspace.PROMPT_TOKENS - cfg_img  # the prompt that is planned for is a long one
    assert workspace.context_tokens(model, height, width) == (gen + longer, cfg_text, cfg_img + longer)


def test_the_dit_copies_three_contexts_for_every_image():
    one, four = (plan_of(dit=DitConfig(max_num_seqs=images)).stages[1] for images in (1, 4))
    model = Checkpoint(CHECKPOINT).config
    new = 3 * ((64 // 16) ** 2 + 2)
    assert one.kv == (sum(workspace.context_tokens(model, 64, 64)) + new) * plan_of().kv_token
    assert four.kv == 4 * one.kv
    assert one.activations < four.activations < 4 * one.activations


def test_a_gpus_workspace_is_made_for_the_largest_images():
    small, large = (plan_of(placement=Placement(CUDA, torch.bfloat16), side=side).stages[1].kv for side in (64, 128))
    model = Checkpoint(CHECKPOINT).config
    assert small == large == plan_of(placement=BFLOAT16, side=model.latent.max_side).stages[1].kv


def test_memory_is_kept_for_adapters_that_may_be_loaded_later(tmp_path: Path):
    folder = write_layers(tmp_path / "a", seed=1, rank=4)
    size = adapter_bytes(folder, torch.float32)
    none, later = plan_of().weights, {"lora_dir": str(tmp_path), "max_lora_rank": 4, "max_loras": 3}
    assert plan_of(**later).weights == none + 2 * 3 * size  # the thinker's and the DiT's
    assert plan_of(**later, lora_modules={"a": folder}).weights == none + 2 * 3 * size
    assert plan_of(**later | {"max_loras": None}).weights == none + 2 * size
    assert plan_of(**later | {"max_loras": None}, lora_modules={"a": folder}).weights == none + 2 * size
    assert plan_of(max_loras=3).weights == none  # none can be loaded


def refusal(need: memory.MemoryPlan, available: Available, placement: Placement = FLOAT32, **changes: object) -> str:
    with pytest.raises(NotEnoughMemory) as error:
        memory.check(need, config_of(CHECKPOINT, **changes), placement, available)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_fits_exactly_is_not_refused():
    need = plan_of()
    memory.check(need, config_of(CHECKPOINT), FLOAT32, Available(host=need.total, shared=need.shared))


def test_too_little_shared_memory():
    need = plan_of()
    message = refusal(need, Available(host=GIB, shared=2**20))
    assert "the KV cache pool (24.00 MiB) and converted weights need" in message
    assert f"{memory.readable(need.shared)} of shared memory and 1.00 MiB are free" in message
    assert "lower thinker.kv_tokens=32768" in message
    assert "--shm-size" in message


def test_too_little_memory_for_keys_and_values():
    need = plan_of(dit=DitConfig(max_num_seqs=5))
    message = refusal(need, Available(host=need.total - 1, shared=GIB), dit=DitConfig(max_num_seqs=5))
    assert f"need {memory.readable(need.total)} of memory and {memory.readable(need.total - 1)} are free" in message
    assert message.endswith(
        f"use dtype bfloat16, or lower dit.max_num_seqs=5, or lower thinker.kv_tokens=32768, or {QUANTISE}"
    )


def test_too_little_memory_for_the_weights():
    need = plan_of()
    message = refusal(need, Available(host=need.weights - 1, shared=GIB))
    assert message.endswith(f"use dtype bfloat16, or use a larger machine, or {QUANTISE}")
    placement = Placement(CUDA, torch.float32)
    available = Available(host=GIB, shared=GIB, device=1)
    message = refusal(plan_of(placement=placement), available, placement)
    assert message.endswith(f"use dtype bfloat16, or use a larger machine, or {QUANTISE}")
    message = refusal(plan_of(placement=placement, shares_weights=False), available, placement)
    assert message.endswith(f"use dtype bfloat16, or serve bagel_single_stage, or {QUANTISE}")
    # Weights that are in memory once cannot be fewer.
    message = refusal(plan_of(placement=BFLOAT16), Available(host=1, shared=GIB), BFLOAT16)
    assert message.endswith(f"): use a larger machine, or {QUANTISE}")


def test_a_devices_memory_is_what_counts_there():
    placement = Placement(torch.device("cuda:1"), torch.bfloat16)
    need = plan_of(placement=placement)
    config = config_of(CHECKPOINT)
    memory.check(need, config, placement, Available(host=1, shared=0, device=need.total))
    message = refusal(need, Available(host=GIB, shared=GIB, device=need.total - 1), placement)
    assert "of memory on cuda:1 and" in message
    assert message.endswith(f"): lower dit.max_num_seqs=8, or lower thinker.kv_tokens=32768, or {QUANTISE}")


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (1023, "1023 B"), (57344, "56.00 KiB"), (3 * 2**40, "3.00 TiB"), (2**51, "2048.00 TiB")],
)
def test_sizes_are_readable(size: int, text: str):
    assert memory.readable(size) == text


def test_a_server_of_one_stage_needs_that_stages_memory_alone() -> None:
    addresses = {1: "10.0.0.2:8001"}
    whole = plan_of(connector="mooncake")
    thinker = plan_of(connector="mooncake", stage_id=0, addresses=addresses)
    rest = plan_of(connector="mooncake", stage_id=1, addresses=addresses)
    assert thinker.stages + rest.stages == whole.stages
    assert [stage.stage for stage in rest.stages] == ["dit", "vae_decode"]
    assert thinker.kv + rest.kv == whole.kv


GPU = Placement(CUDA, torch.bfloat16)


def pool(fraction: float, dit: float | None = None, pipeline: str = "bagel", total: int = GIB) -> int:
    """Tokens of the pool on a GPU of ``total`` bytes."""
    thinker = ThinkerConfig(kv_tokens=64, max_num_batched_tokens=64, gpu_memory_utilization=fraction)
    changes = {"thinker": thinker, "dit": DitConfig(gpu_memory_utilization=dit), "pipeline": pipeline}
    need = plan_of(placement=GPU, **changes)
    config = memory.sized(need, config_of(CHECKPOINT, **changes), Available(1, 1, total, None, total))
    return config.thinker.kv_tokens


def test_the_pool_fills_the_thinkers_part_of_the_gpu():
    need = plan_of(placement=GPU, thinker=ThinkerConfig(kv_tokens=64, max_num_batched_tokens=64))
    thinker = need.stages[0]
    tokens = pool(0.5)
    assert tokens % 16 == 0
    left = GIB // 2 - thinker.weights - thinker.activations - tokens * need.kv_token
    assert 0 <= left < 16 * need.kv_token


def test_both_parts_together_hold_all_stages_and_their_weights_once():
    need = plan_of(placement=GPU, thinker=ThinkerConfig(kv_tokens=64, max_num_batched_tokens=64))
    others = need.total - need.contexts - need.stages[0].kv
    for tokens in (pool(0.5, 0.25), pool(0.75, pipeline="bagel_single_stage")):
        assert 0 <= GIB * 3 // 4 - others - tokens * need.kv_token < 16 * need.kv_token


def test_a_part_that_is_too_small_is_refused_with_what_to_change():
    with pytest.raises(NotEnoughMemory) as error:
        pool(0.01)
    assert str(error.value).startswith("gpu_memory_utilization=0.01 of 1.00 GiB leaves 0 tokens for the KV cache pool")
    assert "kv_tokens=64: raise gpu_memory_utilization, or lower kv_tokens, max_model_len or max_num" in str(
        error.value
    )


def test_the_pool_is_as_configured_without_a_part_and_on_a_cpu():
    config = config_of(CHECKPOINT)
    assert memory.sized(plan_of(), config, Available(1, 1, 2**30, None, 2**30)) is config
    thinker = ThinkerConfig(gpu_memory_utilization=0.5)
    config = config_of(CHECKPOINT, thinker=thinker)
    assert memory.sized(plan_of(thinker=thinker), config, Available(1, 1)) is config


def test_the_readmes_table_is_the_plan(tmp_path: Path) -> None:
    gpu_sizes.write_published(tmp_path / "published")
    checkpoint = Checkpoint(tmp_path / "published")
    assert checkpoint.config == PUBLISHED
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    assert gpu_sizes.table(checkpoint) in readme
    assert gpu_sizes.texts(checkpoint.directory) in readme
    assert gpu_sizes.several(checkpoint) in readme
