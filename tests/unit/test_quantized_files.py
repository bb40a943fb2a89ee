"""Checkpoints that are stored quantised: written, read as they are, and refused where they are not what they say."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bagel_triton.model.config import CheckpointError
from bagel_triton.model.quantization import FORMS
from bagel_triton.serving import cli
from bagel_triton.weights.checkpoint import Checkpoint
from bagel_triton.weights.quantize import write
from bagel_triton.weights.sharing import WeightStore

CPU = torch.device("cpu")
TINY = Path(__file__).parents[1] / "data" / "tiny-a"
EMA = "ema.safetensors"
GATE = "language_model.model.layers.1.mlp.gate_proj"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module", params=FORMS)
def stored(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A form, and the tiny checkpoint in it."""
    folder = tmp_path_factory.mktemp("quantised") / "out"
    write(TINY, folder, request.param)
    return request.param, folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_holds_what_would_be_made_of_the_original(
    stored: tuple[str, Path], dtype: torch.dtype, tmp_path: Path
) -> None:
    form, folder = stored
    expected = Checkpoint(TINY).load_bagel(CPU, dtype, quantization=form).state_dict()
    checkpoint = Checkpoint(folder)
    kept = checkpoint.form(None)
    assert kept is not None
    assert (kept.name, kept.activations) == (form, FORMS[form].activations)
    for shared in (None, WeightStore("test", tmp_path)):
        loaded = checkpoint.load_bagel(CPU, dtype, shared).state_dict()
        assert loaded.keys() == expected.keys()
        for name, tensor in loaded.items():
            assert (tensor.dtype, tensor.shape) == (expected[name].dtype, expected[name].shape)
            assert torch.equal(tensor.view(torch.uint8), expected[name].view(torch.uint8)), name


def test_nothing_of_it_is_copied_where_the_dtype_is_the_stored_one(stored: tuple[str, Path], tmp_path: Path) -> None:
    checkpoint = Checkpoint(stored[1])
    checkpoint.load_bagel(CPU, torch.bfloat16, WeightStore("test", tmp_path))
    assert not [*tmp_path.iterdir()]
    assert checkpoint.stored_apart(torch.bfloat16) == 0


def test_other_forms_are_made_of_the_same_codes_alone(stored: tuple[str, Path]) -> None:
    checkpoint, storage = Checkpoint(stored[1]), FORMS[stored[0]].storage
    for name, form in FORMS.items():
        if form.storage == storage:
            found = checkpoint.form(name)
            assert found is not None
            assert (found.name, found.activations) == (name, form.activations)
        else:
            with pytest.raises(CheckpointError, match=rf"quantization='{name}' is not allowed: .*allowed: {storage}"):
                checkpoint.form(name)
    with pytest.raises(CheckpointError, match="is quantised already, as"):
        write(stored[1], stored[1].with_name("again"), "int8")


def test_the_command_writes_a_whole_checkpoint_or_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["quantize", str(TINY), str(tmp_path / "out"), "--quantization", "int4"]) == 0
    assert "the transformer in int4 takes" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {EMA, "ae.safetensors", "config.json", "vocab.json"}
    assert cli.main(["quantize", str(TINY), str(tmp_path / "out")]) == 1
    assert "exists and is not an empty folder" in capsys.readouterr().err
    broken = shutil.copytree(TINY, tmp_path / "broken")
    held = load_file(broken / EMA)
    held[f"{GATE}.weight"][3, 5] = float("nan")
    save_file(held, broken / EMA)
    assert cli.main(["quantize", str(broken), str(tmp_path / "other")]) == 1
    assert f"tensor {GATE}.weight has NaN or infinite values" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"out", "broken"}


# --- what others write ---


def test_compressed_tensors_own_groups_are_read(tmp_path: Path) -> None:
    """Groups of another size, as other programs choose them."""
    write(TINY, tmp_path / "out", "int4")
    config, held = json.loads((tmp_path / "out/config.json").read_text()), load_file(tmp_path / "out" / EMA)
    for name, scale in list(held.items()):
        if name.endswith("weight_scale"):
            held[name] = scale.repeat_interleave(2, dim=1)  # half as large
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["group_size"] = 16
    save_file(held, tmp_path / "out" / EMA)
    (tmp_path / "out/config.json").write_text(json.dumps(config))
    for name in ("gen.qkv_proj", "und.mlp.down_proj"):
        halves, whole = (
            Checkpoint(folder)
            .load_bagel(CPU, torch.float32, quantization="int4")
            .get_submodule(f"language_model.model.layers.1.{name}")
            .dense(torch.float32)  # type: ignore[operator]
            for folder in (tmp_path / "out", TINY)
        )
        assert torch.equal(halves, whole)


def tensors(edit: Callable[[Tensors], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        held = load_file(folder / EMA)
        edit(held)
        save_file(held, folder / EMA)

    return damage


def weights(**changes: Any) -> Callable[[Path], None]:
    """Change what the configuration says of the weights."""

    def damage(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"]["config_groups"]["group_0"]["weights"].update(changes)
        (folder / "config.json").write_text(json.dumps(config))

    return damage


def settings(**changes: Any) -> Callable[[Path], None]:
    """Change what the configuration says of the whole."""

    def damage(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"].update(changes)
        (folder / "config.json").write_text(json.dumps(config))

    return damage


def group(**changes: Any) -> Callable[[Path], None]:
    """Change what the configuration says of its group."""

    def damage(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"]["config_groups"]["group_0"].update(changes)
        (folder / "config.json").write_text(json.dumps(config))

    return damage


ROWS = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True, "strategy": "token"}


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (tensors(lambda held: held.pop(f"{GATE}.weight_scale")), f"has no tensor {GATE}.weight_scale"),
        (
            tensors(lambda held: held.update({f"{GATE}.weight_scale": torch.ones(1)})),
            f"tensor {GATE}.weight_scale has shape",
        ),
        (
            tensors(lambda held: held.update({f"{GATE}.weight": torch.ones(160, 96)})),
            f"tensor {GATE}.weight is stored as F32; allowed: I8, by the quantization_config",
        ),
        (
            tensors(lambda held: held.update({"llm2vae.weight": torch.ones(64, 96, dtype=torch.int8)})),
            "tensor llm2vae.weight is stored as I8; allowed: BF16, F16, F32, F64",
        ),
        (
            tensors(lambda held: held.update({f"{GATE}.weight_zero_point": torch.ones(1)})),
            f"tensor {GATE}.weight_zero_point belongs to weights quantised by",
        ),
        (weights(symmetric=False), "format='int-quantized' with other settings"),
        (weights(strategy="tensor"), "format='int-quantized' with other settings"),
        (weights(num_bits=4), "format='int-quantized' with other settings"),
        (weights(dynamic=True), "quantization_config has dynamic=True, which is not read"),
        (settings(config_groups={}), "format='int-quantized' with other settings"),
        (settings(transform_config={"R1": {}}), "quantization_config has transform_config={'R1': {}}, which is not"),
        (settings(sparsity_config={"format": "sparse-24"}), "quantization_config has sparsity_config={'format'"),
        (settings(kv_cache_scheme={"num_bits": 8}), "quantization_config has kv_cache_scheme={'num_bits': 8}, which"),
        (settings(quant_method=None, load_in_8bit=True), "quantization_config is that of quant_method='bitsandbytes'"),
        (group(output_activations=ROWS), "quantization_config has output_activations="),
        (group(input_activations={**ROWS, "type": "float"}), "format='int-quantized' with other settings"),
        (group(input_activations={**ROWS, "num_bits": 4}), "format='int-quantized' with other settings"),
        (group(format="pack-quantized"), "format='int-quantized' with other settings"),
    ],
)
def test_files_that_are_not_what_they_say_are_refused(
    tmp_path: Path, damage: Callable[[Path], None], said: str
) -> None:
    write(TINY, tmp_path / "out", "int8")
    damage(tmp_path / "out")
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(tmp_path / "out")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_settings_that_change_nothing_are_taken(tmp_path: Path) -> None:
    write(TINY, tmp_path / "out", "int8")
    neutral = {
        "version": "0.15",
        "kv_cache_scheme": None,
        "transform_config": {},
        "sparsity_config": {"format": "dense"},
    }
    settings(**neutral)(tmp_path / "out")
    weights(observer="mse", observer_kwargs={"x": 1}, scale_dtype="torch.float32", actorder=None)(tmp_path / "out")
    group(output_activations=None, format="int-quantized", input_activations=ROWS)(tmp_path / "out")
    found = Checkpoint(tmp_path / "out").form(None)
    assert found is not None
    assert found.name == "int8_w8a8"


@pytest.mark.parametrize("name", [f"{GATE}.weight_scale", "language_model.model.layers.1.self_attn.q_proj.bias"])
def test_a_scale_or_bias_that_is_no_number_is_found_while_it_is_loaded(tmp_path: Path, name: str) -> None:
    write(TINY, tmp_path / "out", "fp8")
    tensors(lambda held: held[name].fill_(float("inf")))(tmp_path / "out")
    with pytest.raises(CheckpointError, match=rf"tensor {name} has NaN or infinite values"):
        Checkpoint(tmp_path / "out").load_bagel(CPU, torch.float32)
