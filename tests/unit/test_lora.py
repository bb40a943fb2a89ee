"""A LoRA adapter in PEFT's layout is the weights it was merged into, and one for other weights is refused."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bagel_triton.deploy import yaml as deploy_yaml
from bagel_triton.model.config import CheckpointError
from bagel_triton.serving import cli
from bagel_triton.weights import layout
from bagel_triton.weights.checkpoint import Checkpoint
from bagel_triton.weights.sharing import WeightStore

CPU = torch.device("cpu")
TINY = Path(__file__).parents[1] / "data" / "tiny-a"
LAYER = "language_model.model.layers.1"
RANK, ALPHA = 4, 6.0
# A part of a packed parameter, the other expert's, a whole one, one outside the layers: [out, in].
ADAPTED = {
    f"{LAYER}.self_attn.k_proj": (32, 96),
    f"{LAYER}.self_attn.q_proj_moe_gen": (96, 96),
    f"{LAYER}.mlp_moe_gen.up_proj": (160, 96),
    f"{LAYER}.mlp.down_proj": (96, 160),
    "connector.fc2": (96, 96),
}
Tensors = dict[str, torch.Tensor]


def write_adapter(folder: Path, **config: Any) -> tuple[Path, Tensors]:
    """An adapter of :data:`ADAPTED`, and what it adds to each weight."""
    generator = torch.Generator().manual_seed(0)
    tensors, updates = {}, {}
    for module, (rows, inner) in ADAPTED.items():
        down, up = torch.randn(RANK, inner, generator=generator), torch.randn(rows, RANK, generator=generator)
        tensors[f"base_model.model.{module}.lora_A.weight"] = down
        tensors[f"base_model.model.{module}.lora_B.weight"] = up
        updates[f"{module}.weight"] = up @ down
    folder.mkdir()
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "bias": "none", **config})
    )
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder, updates


@pytest.fixture
def merged(tmp_path: Path) -> Callable[[Tensors, float], Path]:
    """Writes the tiny checkpoint in float32 with updates added to it."""

    def write(updates: Tensors, scaling: float) -> Path:
        folder = shutil.copytree(TINY, tmp_path / "merged")
        held = {name: tensor.float() for name, tensor in load_file(folder / "ema.safetensors").items()}
        for name, update in updates.items():
            held[name] += scaling * update
        save_file(held, folder / "ema.safetensors")
        return folder

    return write


@pytest.mark.parametrize(
    ("config", "scale", "scaling"),
    [
        ({}, 1.0, ALPHA / RANK),
        ({}, -0.5, -0.5 * ALPHA / RANK),
        ({"use_rslora": True}, 1.0, ALPHA / math.sqrt(RANK)),
        ({"alpha_pattern": {"k_proj|q_proj_moe_gen|up_proj|down_proj|fc2": 2.0}}, 1.0, 2.0 / RANK),
        ({"alpha_pattern": {".*": 0}}, 1.0, 0.0),
        ({"r": 8, "rank_pattern": {".*": RANK}}, 1.0, ALPHA / RANK),
        # What PEFT writes of an adapter's training changes nothing.
        (
            {
                **{"init_lora_weights": "gaussian", "target_modules": ["q_proj"], "runtime_config": {"x": 1}},
                **{"inference_mode": True, "peft_version": "0.21.2", "qalora_group_size": 16, "use_dora": False},
            },
            1.0,
            ALPHA / RANK,
        ),
    ],
)
@pytest.mark.parametrize("quantization", [None, "int8"])
def test_it_is_the_weights_it_would_be_merged_into(
    merged: Callable[[Tensors, float], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    config: dict[str, Any],
    scale: float,
    scaling: float,
    quantization: str | None,
) -> None:
    monkeypatch.setattr(layout, "AT_ONCE", 2000)  # several pieces of a weight
    adapter, updates = write_adapter(tmp_path / "adapter", **config)
    expected = Checkpoint(merged(updates, scaling)).load_bagel(CPU, torch.float32, quantization=quantization)
    (tmp_path / "shm").mkdir()
    for shared in (None, WeightStore("test", tmp_path / "shm")):
        found = Checkpoint(TINY, (str(adapter), scale)).load_bagel(CPU, torch.float32, shared, quantization)
        for name, tensor in found.state_dict().items():
            other = expected.state_dict()[name]
            if tensor.dtype == torch.int8:  # a weight between two codes may become either
                assert (tensor.int() - other.int()).abs().max() <= 1
            else:
                torch.testing.assert_close(tensor, other, rtol=2e-5, atol=2e-5)


def test_servers_with_another_adapter_or_scale_have_weights_of_their_own(tmp_path: Path) -> None:
    adapter, _ = write_adapter(tmp_path / "adapter")
    (tmp_path / "shm").mkdir()
    given = (None, (str(adapter), 1.0), (str(adapter), 0.5))
    kept = [
        Checkpoint(TINY, one).load_bagel(CPU, torch.float32, WeightStore("test", tmp_path / "shm")).state_dict()
        for one in given
    ]
    gates = [state[f"{LAYER}.gen.mlp.gate_up_proj.weight"] for state in kept]
    assert not torch.equal(gates[0], gates[1])
    assert not torch.equal(gates[1], gates[2])
    # In the stored dtype it cannot be mapped from the file, which the plan of memory counts.
    plain, adapted = (Checkpoint(TINY, one).stored_apart(torch.bfloat16) for one in given[:2])
    assert adapted == plain + 2 * (3 * 160 * 96 + 96 * 96)  # queries, keys and values are copied into one anyway


def test_quantize_merges_it_and_takes_none_afterwards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter, _ = write_adapter(tmp_path / "adapter")
    given = ["--quantization", "nf4", "--lora-path", str(adapter), "--lora-scale", "0.5"]
    assert cli.main(["quantize", str(TINY), str(tmp_path / "out"), *given]) == 0
    stored = Checkpoint(tmp_path / "out").load_bagel(CPU, torch.bfloat16).state_dict()
    expected = Checkpoint(TINY, (str(adapter), 0.5)).load_bagel(CPU, torch.bfloat16, quantization="nf4").state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in stored.items())
    assert cli.main(["memory", str(tmp_path / "out"), "--lora-path", str(adapter)]) == 1
    assert "is quantised, as nf4, and takes no adapter" in capsys.readouterr().err


@pytest.mark.parametrize("scale", ["nan", "1e300"])
def test_a_scale_that_makes_no_weights_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], scale: str
) -> None:
    adapter, _ = write_adapter(tmp_path / "adapter")
    given = ["--lora-path", str(adapter), "--lora-scale", scale]
    assert cli.main(["quantize", str(TINY), str(tmp_path / "out"), *given]) == 1
    assert "has values beyond float32 times" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_deploy_file_names_it_for_all_stages(tmp_path: Path) -> None:
    path = tmp_path / "deploy.yaml"
    path.write_text("stages: [{stage_id: 1, lora_path: a, lora_scale: 0.5}]")
    assert deploy_yaml.load(path, "x").adapter == ("a", 0.5)
    path.write_text("lora_path: a")
    assert deploy_yaml.load(path, "x").adapter == ("a", 1.0)


def tensors(edit: Callable[[Tensors], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        held = load_file(folder / "adapter_model.safetensors")
        edit(held)
        save_file({name: tensor.contiguous() for name, tensor in held.items()}, folder / "adapter_model.safetensors")

    return damage


def field(**changes: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


DOWN = f"base_model.model.{LAYER}.mlp.down_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / "adapter_config.json").unlink(), "cannot be read as a LoRA adapter's configuration"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "adapter_model.safetensors does not exist"),
        (field(peft_type="LOHA"), "peft_type='LOHA' is not allowed; allowed: 'LORA'"),
        (field(use_dora=True), "use_dora=True is not allowed"),
        (field(bias="all"), "bias='all' is not allowed; allowed: 'none'"),
        (field(modules_to_save=["lm_head"]), "modules_to_save=['lm_head'] is not allowed"),
        # Parts of the weights were taken out of them, it counts on tokens, or nothing is known of it.
        (field(init_lora_weights="pissa_niter_16"), "init_lora_weights='pissa_niter_16' is not allowed"),
        (field(alora_invocation_tokens=[5]), "alora_invocation_tokens=[5] is not allowed; allowed: null, false"),
        (field(use_something_new=True), "use_something_new=True is not allowed; allowed: null, false"),
        (field(r=8), "have rank 4; adapter_config.json says 8"),
        (field(rank_pattern={"down_proj": 2}), "down_proj have rank 4; adapter_config.json says 2"),
        (field(rank_pattern=[2]), "rank_pattern=[2] is not allowed; allowed: numbers by patterns"),
        (field(lora_alpha="x"), "lora_alpha='x' is not allowed; allowed: a number"),
        (field(lora_alpha=1e308), "lora_alpha=1e+308 is not allowed; allowed: a number"),
        (field(alpha_pattern={"(": 2.0}), "alpha_pattern={'(': 2.0} is not allowed; allowed: numbers by patterns"),
        (field(alpha_pattern=["q_proj"]), "alpha_pattern=['q_proj'] is not allowed; allowed: numbers by patterns"),
        (field(alpha_pattern={"q_proj": "2"}), "alpha_pattern[q_proj]='2' is not allowed; allowed: a number"),
        (
            tensors(lambda held: held.pop(DOWN)),
            "layers.1.mlp.down_proj have the shapes [(96, 4)]",
        ),
        (tensors(lambda held: held.update({DOWN: held[DOWN][:, :9]})), "the checkpoint's is [96, 160]"),
        (tensors(lambda held: held[DOWN].fill_(math.nan)), "has NaN or infinite values"),
        (
            tensors(lambda held: held.update({DOWN: held[DOWN].double().fill_(1e300)})),  # beyond float32
            "has NaN or infinite values",
        ),
        (
            tensors(lambda held: held.update({DOWN.replace("A.", "A.default."): held[DOWN].clone()})),
            "is there under two names",
        ),
        (
            tensors(lambda held: held.update({"x.lora_embedding_A": torch.ones(3)})),
            "is not allowed; allowed",
        ),
        (
            tensors(
                lambda held: held.update(
                    {f"base_model.model.x.lora_{side}.weight": torch.ones(RANK, RANK) for side in ("A", "B")}
                )
            ),
            "adapts x, which is no module of the checkpoint",
        ),
    ],
)
def test_what_is_no_adapter_of_the_checkpoint_is_refused(
    tmp_path: Path, damage: Callable[[Path], None], said: str
) -> None:
    adapter, _ = write_adapter(tmp_path / "adapter")
    damage(adapter)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(TINY, (str(adapter), 1.0))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
