"""The table of docs/parallelism.md, what combines: every entry serves, or is refused by name before a start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from bagel_triton.deploy import yaml as deploy_yaml
from bagel_triton.deploy.config import ConfigError, DeployConfig, DitConfig
from bagel_triton.deploy.topology import DECODER, DIT, THINKER
from bagel_triton.parallel import sizes
from bagel_triton.pipeline.local import LocalStages
from bagel_triton.protocol.request import GenerationRequest
from bagel_triton.weights.checkpoint import inspect
from tests.support.nearness import mean_levels
from tests.support.runs import generate, result_of
from tests.unit.test_lora import write_adapter

# The table's columns: a stage and its field.
SIZES = {
    "`tensor_parallel_size` of stage 0": (0, "tensor_parallel_size"),
    "`tensor_parallel_size` of stage 1": (1, "tensor_parallel_size"),
    "`cfg_parallel_size`": (1, "cfg_parallel_size"),
    "`ulysses_degree`": (1, "ulysses_degree"),
    "`vae_patch_parallel_size`": (1, "vae_patch_parallel_size"),
    "`use_hsdp`": (1, "use_hsdp"),
}
BESIDE: dict[str, dict[str, Any]] = {"use_hsdp": {"use_hsdp": True, "hsdp_shard_size": 2}}  # of others 2 alone
DOC = (Path(__file__).parents[2] / "docs" / "parallelism.md").read_text()
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in DOC.partition(f"| | {' | '.join(SIZES)} |")[2].partition("\n\n")[0].splitlines()[2:]
]
ENTRIES = [(row[0], size, entry) for row in ROWS for size, entry in zip(SIZES, row[1:], strict=True) if entry]
# By row: fields of one stage, its id (None for the column's own), and fields of the whole file.
FIELDS: dict[str, list[tuple[dict[str, Any], int | None, dict[str, Any]]]] = {
    **{name: [({field: 2}, stage_id, {})] for name, (stage_id, field) in [*SIZES.items()][:4]},
    "`quantization`": [({}, None, {"quantization": "int8"})],
    "`cpu_offload_gb`": [({}, None, {"cpu_offload_gb": 1})],
    "`lora_path`": [({}, None, {"lora_path": "ADAPTER"})],
    "`lora_modules`": [({}, None, {"lora_modules": {"a": "ADAPTER"}})],
    "`dtype: bfloat16`": [({}, None, {"dtype": "bfloat16"})],
    "`pipeline: bagel_think`": [({}, None, {"pipeline": "bagel_think"})],
    "`pipeline: bagel_single_stage`": [({}, None, {"pipeline": "bagel_single_stage"})],
    "TaylorSeer, `n`, thinking, editing": [({}, None, {})],
    "`load: understanding`": [({}, None, {"load": "understanding"})],
    "`device: cuda`": [({}, None, {"device": "cuda"})],
    "`vae_patch_parallel_size`": [({"parallel_config": {"vae_patch_parallel_size": 2}}, 1, {})],
    "`use_hsdp`": [(BESIDE["use_hsdp"], 1, {})],
    "`vae_use_tiling: false`": [({"vae_use_tiling": False}, 1, {})],
    "`worker_backend: ray`": [({}, None, {"worker_backend": "ray"})],
    "`ring_degree`": [
        ({"ring_degree": 2}, None, {}),
    ],
}
REQUEST = GenerationRequest(
    prompt="A cute cat", height=64, width=48, seed=3, num_inference_steps=12, n=2, cache="taylorseer", think=False
)
TEXT = GenerationRequest(prompt="A cute cat", modality="text", max_tokens=12)


def config_of(
    checkpoint: Path, folder: Path, size: str, fields: dict[str, Any], of: int | None, top: dict[str, Any]
) -> DeployConfig:
    """The configuration of a file with two ranks by ``size`` and these fields; a relative adapter is made.

    Raises:
        ConfigError: the file, or its ranks, are refused.
    """
    if "lora_path" in top:
        top = {**top, "lora_path": str(write_adapter(folder / "adapter")[0])}
    one = top.get("pipeline") == "bagel_single_stage"
    stage_id, name = SIZES[size]
    stages: dict[int, dict[str, Any]] = {}
    for number, values in ((stage_id, BESIDE.get(name, {name: 2})), (stage_id if of is None else of, fields)):
        stages.setdefault(0 if one else number, {}).update(values)
    written = {"device": "cpu", **top, "stages": [{"stage_id": number, **stages[number]} for number in stages]}
    path = folder / "deploy.yaml"
    path.write_bytes(msgspec.yaml.encode(written))
    config = deploy_yaml.load(path, str(checkpoint))
    sizes.check(config, inspect(config.checkpoint).language)
    return config


def ranks_of(config: DeployConfig) -> set[int]:
    return {sizes.Sizes.of(config, stage).ranks for stage in (THINKER, DIT, DECODER)}


def test_the_table_has_every_row() -> None:
    assert [row[0] for row in ROWS] == list(FIELDS)


@pytest.fixture
def checkpoint(row: str, size: str, checkpoint_dir: Path, other_checkpoint: Path) -> Path:
    """One whose heads these ranks divide."""
    return other_checkpoint if {row, size} == set(list(SIZES)[1:4:2]) else checkpoint_dir


@pytest.mark.parametrize(("row", "size", "entry"), ENTRIES)
def test_an_entry_is_true(
    checkpoint: Path, tmp_path: Path, row: str, size: str, entry: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sizes, "find_spec", lambda name: name)  # Ray is optional
    for fields, of, top in FIELDS[row]:
        if entry.startswith("serves"):
            assert ranks_of(config_of(checkpoint, tmp_path, size, fields, of, top)) & {2, 4}
            continue
        with pytest.raises(ConfigError) as caught:
            config_of(checkpoint, tmp_path, size, fields, of, top)
        name = next(iter(fields.get("parallel_config", fields)), SIZES[size][1])
        assert " is not supported" in str(caught.value)
        assert name in str(caught.value)


@pytest.mark.parametrize("size", SIZES)
def test_ray_that_is_not_installed_is_named(
    checkpoint_dir: Path, tmp_path: Path, size: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sizes, "find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"^worker_backend='ray' .* pip install 'bagel-triton\[ray\]'; allowed: process"
    ):
        config_of(checkpoint_dir, tmp_path, size, {}, None, {"worker_backend": "ray"})


@pytest.mark.parametrize("stage", ["thinker", "dit"])
@pytest.mark.parametrize(("heads", "allowed"), [("checkpoint_dir", "1, 2"), ("other_checkpoint", "1, 2, 4")])
def test_a_size_that_does_not_divide_is_refused_with_those_that_do(
    heads: str, allowed: str, stage: str, request: pytest.FixtureRequest
) -> None:
    checkpoint = request.getfixturevalue(heads)
    path = {"thinker": "`tensor_parallel_size` of stage 0", "dit": "`tensor_parallel_size` of stage 1"}[stage]
    config = DeployConfig(checkpoint=str(checkpoint))
    config = msgspec.structs.replace(
        config, **{stage: msgspec.structs.replace(getattr(config, stage), **{SIZES[path][1]: 3})}
    )
    with pytest.raises(ConfigError) as caught:
        sizes.check(config, inspect(config.checkpoint).language)
    assert str(caught.value).startswith(f"{stage}.tensor_parallel_size=3 does not divide the checkpoint's ")
    assert str(caught.value).endswith(f"; allowed: {allowed}")


def test_rows_are_shared_by_as_many_ranks_as_heads_are(checkpoint_dir: Path) -> None:
    """Beside tensor parallelism each rank has a part of a part of the heads."""
    language = inspect(str(checkpoint_dir)).language
    for dit, allowed in (
        (DitConfig(ulysses_degree=4), "1, 2, 6"),
        (DitConfig(ulysses_degree=2, tensor_parallel_size=2), "1, 3"),
    ):
        with pytest.raises(ConfigError, match=rf"^dit.ulysses_degree=\d.* does not divide .*; allowed: {allowed}$"):
            sizes.check(DeployConfig(checkpoint=str(checkpoint_dir), dit=dit), language)


@pytest.mark.parametrize(
    ("dit", "ranks"),
    [
        (DitConfig(use_hsdp=True, hsdp_shard_size=4), (4, 4)),
        (DitConfig(use_hsdp=True, hsdp_shard_size=2, hsdp_replicate_size=2), (4, 2)),
        (DitConfig(use_hsdp=True, cfg_parallel_size=2), (2, 2)),
        (DitConfig(use_hsdp=True, cfg_parallel_size=2, ulysses_degree=2, hsdp_replicate_size=2), (4, 2)),
        (DitConfig(hsdp_shard_size=4), "dit.hsdp_shard_size=4 is not allowed without use_hsdp: true; allowed: 1"),
        (DitConfig(use_hsdp=True), "dit.use_hsdp=true is not allowed for one rank; set hsdp_shard_size, cfg_"),
        (
            DitConfig(use_hsdp=True, cfg_parallel_size=2, hsdp_shard_size=4),
            "dit.hsdp_shard_size=4 with hsdp_replicate_size=1 is not allowed for the 2 ranks of cfg_parallel_size and",
        ),
    ],
)
def test_the_sizes_of_hsdp_make_the_ranks(checkpoint_dir: Path, dit: DitConfig, ranks: tuple[int, int] | str) -> None:
    """How many, and how many of them have one copy of the weights together."""
    config, language = DeployConfig(checkpoint=str(checkpoint_dir), dit=dit), inspect(str(checkpoint_dir)).language
    if isinstance(ranks, str):
        with pytest.raises(ConfigError) as caught:
            sizes.check(config, language)
        assert str(caught.value).startswith(ranks)
        return
    sizes.check(config, language)
    assert (sizes.Sizes.of(config, DIT).ranks, sizes.Sizes.of(config, DIT).shard) == ranks


# Of sizes that have tests of their own, a few.
FEW = ("`pipeline: bagel_single_stage`", "`dtype: bfloat16`", "`cfg_parallel_size`")
SERVED = [
    entry[:2] for entry in ENTRIES if entry[2].startswith("serves") and (entry[1] in [*SIZES][:4] or entry[0] in FEW)
]


@pytest.mark.long
@pytest.mark.parametrize(("row", "size"), SERVED)
def test_it_serves_what_one_rank_does(checkpoint: Path, tmp_path: Path, row: str, size: str) -> None:
    [(fields, of, top)] = FIELDS[row]
    if "worker_backend" in top:
        pytest.skip("tests/serving/test_ray_ranks.py has a cluster")
    config = config_of(checkpoint, tmp_path, size, fields, of, top)
    if config.load == "understanding":
        pytest.skip("it draws nothing")
    if config.device == "cuda":
        pytest.skip("tests/gpu/test_ranks_gpu.py has GPUs")
    thinker, dit = (sizes.Sizes.of(config, stage) for stage in (THINKER, DIT))
    if min(thinker.ranks, dit.ranks) > 1 and thinker.tensor != dit.tensor:
        pytest.skip("this test has both stages in one process")
    alone = DeployConfig(
        **{name: getattr(config, name) for name in ("checkpoint", "pipeline", "device", "dtype")},
        lora_path=config.lora_path,
        thinker=msgspec.structs.replace(config.thinker, tensor_parallel_size=1),
        dit=DitConfig(quantization=config.dit.quantization),
    )
    images, texts = [], []
    for one in (config, alone):
        stages = LocalStages(one)
        try:
            images.append(generate(stages, REQUEST).pixels)
            texts.append([text.content for text in result_of(stages.think(result_of(stages.expand(TEXT)))).answers])
        finally:
            stages.close()
    for ours, expected in zip(*images, strict=True):
        assert mean_levels(ours, expected) < (2 if config.dtype == "bfloat16" else 0.1)
    if config.dtype != "bfloat16":
        assert texts[0] == texts[1]
