"""The table of docs/deploy.md, what composes with what: every entry serves, or is refused by name before a start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from bagel_triton.deploy import yaml as deploy_yaml
from bagel_triton.deploy.config import ConfigError, DeployConfig
from bagel_triton.parallel import sizes
from bagel_triton.pipeline.local import LocalStages
from bagel_triton.protocol.request import GenerationRequest
from bagel_triton.serving import flags, serve
from bagel_triton.weights.checkpoint import inspect
from tests.support.nearness import mean_levels
from tests.support.runs import generate
from tests.unit.test_lora import write_adapter
from tests.unit.test_serving_flags import Parser, Refused

SIZES = ("tensor_parallel_size", "cfg_parallel_size")
TABLE = (Path(__file__).parents[2] / "docs" / "deploy.md").read_text().partition("| | with `tensor_parallel_size`")[2]
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in TABLE.partition("\n\n")[0].splitlines()[2:]]
ENTRIES = [(row[0], size, entry) for row in ROWS for size, entry in zip(SIZES, row[1:], strict=True) if entry]
# By row: fields of stage 1, and of the whole file.
FIELDS: dict[str, list[tuple[dict[str, Any], dict[str, Any]]]] = {
    "`tensor_parallel_size`": [({"tensor_parallel_size": 2}, {})],
    "`cfg_parallel_size`": [({"cfg_parallel_size": 2}, {})],
    "`quantization`": [({}, {"quantization": "int8"})],
    "`lora_path`": [({}, {"lora_path": "ADAPTER"})],
    "`lora_modules`": [({}, {"lora_modules": {"a": "ADAPTER"}})],
    "`dtype: bfloat16`": [({}, {"dtype": "bfloat16"})],
    "`pipeline: bagel_think`": [({}, {"pipeline": "bagel_think"})],
    "`pipeline: bagel_single_stage`": [({}, {"pipeline": "bagel_single_stage"})],
    "TaylorSeer, `n`, thinking, editing": [({}, {})],
    "`load: understanding`": [({}, {"load": "understanding"})],
    "`device: cuda`": [({}, {"device": "cuda"})],
    "`use_hsdp`, `vae_patch_parallel_size`, `ulysses_degree`, `--worker-backend ray`": [
        ({"use_hsdp": True}, {}),
        ({"parallel_config": {"vae_patch_parallel_size": 2}}, {}),
        ({"ulysses_degree": 2}, {}),
    ],
}
REQUEST = GenerationRequest(
    prompt="A cute cat", height=64, width=48, seed=3, num_inference_steps=12, n=2, cache="taylorseer", think=False
)


def config_of(checkpoint: Path, folder: Path, stage: dict[str, Any], top: dict[str, Any]) -> DeployConfig:
    """The configuration of a file with these fields; a relative adapter is made.

    Raises:
        ConfigError: the file, or its ranks, are refused.
    """
    if "lora_path" in top:
        top = {**top, "lora_path": str(write_adapter(folder / "adapter")[0])}
    stage_id = 0 if top.get("pipeline") == "bagel_single_stage" else 1
    path = folder / "deploy.yaml"
    path.write_bytes(msgspec.yaml.encode({"device": "cpu", **top, "stages": [{"stage_id": stage_id, **stage}]}))
    config = deploy_yaml.load(path, str(checkpoint))
    sizes.check(config, inspect(config.checkpoint).language, "cuda:0" if config.device == "cuda" else "cpu")
    return config


def test_the_table_has_every_row() -> None:
    assert [row[0] for row in ROWS] == list(FIELDS)


@pytest.mark.parametrize(("row", "size", "entry"), ENTRIES)
def test_an_entry_is_true(checkpoint_dir: Path, tmp_path: Path, row: str, size: str, entry: str) -> None:
    for stage, top in FIELDS[row]:
        if entry.startswith("serves"):
            assert config_of(checkpoint_dir, tmp_path, {size: 2, **stage}, top).dit.ranks == 2
            continue
        with pytest.raises(ConfigError) as caught:
            config_of(checkpoint_dir, tmp_path, {size: 2, **stage}, top)
        name = next(iter(stage.get("parallel_config", stage)), size)
        assert " is not supported" in str(caught.value)
        assert name in str(caught.value)


@pytest.mark.parametrize("flag", ["--worker-backend ray", "--ray-address 127.0.0.1:6379"])
def test_ray_is_refused(flag: str) -> None:
    parser = Parser(allow_abbrev=False)
    serve.add_arguments(parser)
    with pytest.raises(Refused, match="is not supported: there is no Ray cluster"):
        flags.flags_of(parser.parse_args(["x", "--tensor-parallel-size", "2", *flag.split()]))


@pytest.mark.parametrize(("heads", "allowed"), [("checkpoint_dir", "1, 2"), ("other_checkpoint", "1, 2, 4")])
def test_a_size_that_does_not_divide_is_refused_with_those_that_do(
    heads: str, allowed: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    with pytest.raises(ConfigError) as caught:
        config_of(request.getfixturevalue(heads), tmp_path, {"tensor_parallel_size": 3}, {})
    assert str(caught.value).startswith("dit.tensor_parallel_size=3 does not divide the checkpoint's ")
    assert str(caught.value).endswith(f"; allowed: {allowed}")


@pytest.mark.long
@pytest.mark.parametrize(("row", "size"), [entry[:2] for entry in ENTRIES if entry[2].startswith("serves")])
def test_it_serves_what_one_rank_does(checkpoint_dir: Path, tmp_path: Path, row: str, size: str) -> None:
    [(stage, top)] = FIELDS[row]
    config = config_of(checkpoint_dir, tmp_path, {size: 2, **stage}, top)
    alone = msgspec.structs.replace(config.dit, tensor_parallel_size=1, cfg_parallel_size=1)
    images = []
    for one in (config, msgspec.structs.replace(config, dit=alone)):
        stages = LocalStages(one)
        try:
            images.append(generate(stages, REQUEST).pixels)
        finally:
            stages.close()
    for ours, expected in zip(*images, strict=True):
        assert mean_levels(ours, expected) < (2 if config.dtype == "bfloat16" else 0.1)
