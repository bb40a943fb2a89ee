"""The tiny checkpoint has the published layout, loads, and refuses what it cannot make."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bagel_triton.deploy.config import ConfigError
from bagel_triton.model.autoencoder import decode
from bagel_triton.weights.checkpoint import Checkpoint
from bagel_triton.weights.tiny import checkpoint as tiny_checkpoint
from bagel_triton.weights.tiny.config import TinyConfig

PUBLISHED = Path(__file__).parents[1] / "data" / "tiny-a"
LIKE_PUBLISHED = TinyConfig(hidden_size=96, layers=3, heads=6, kv_heads=2, intermediate_size=160)
OTHER = TinyConfig(
    hidden_size=128,
    layers=3,
    heads=8,
    kv_heads=1,
    vae_channels=64,
    max_latent_size=32,
    stale_max_latent_size=64,
    shards=3,
)


@pytest.fixture(scope="module")
def default(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny") / "default"
    tiny_checkpoint.write(directory, TinyConfig())
    return directory


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny") / "other"
    tiny_checkpoint.write(directory, OTHER)
    return directory


def _weights(directory: Path) -> dict[str, torch.Tensor]:
    """The transformer's tensors, found as a reader of the index finds them."""
    weight_map = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    files = {name: load_file(directory / name) for name in set(weight_map.values())}
    assert {name for tensors in files.values() for name in tensors} == set(weight_map)
    return {name: files[file][name] for name, file in weight_map.items()}


def _layout(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def _fields(directory: Path, name: str) -> dict[str, object]:
    fields = json.loads((directory / name).read_text())
    assert isinstance(fields, dict)
    return fields


def test_files_tensors_and_fields_are_those_of_the_published_layout(tmp_path: Path) -> None:
    made = tmp_path / "made"
    tiny_checkpoint.write(made, LIKE_PUBLISHED)
    assert {path.name for path in made.iterdir()} == {path.name for path in PUBLISHED.iterdir()}
    assert _layout(_weights(made)) == _layout(_weights(PUBLISHED))
    assert _layout(load_file(made / "ae.safetensors")) == _layout(load_file(PUBLISHED / "ae.safetensors"))
    for name in ("llm_config.json", "vit_config.json", "tokenizer_config.json"):
        assert _fields(made, name).keys() == _fields(PUBLISHED, name).keys(), name
    ours, theirs = (_fields(directory, "config.json") for directory in (made, PUBLISHED))
    for fields in (ours, theirs):
        llm = fields["llm_config"]
        assert isinstance(llm, dict)
        # Ids depend on the size of the trained vocabulary.
        del llm["bos_token_id"], llm["eos_token_id"]
    assert ours == theirs


def test_every_expert_tensor_has_its_twin_that_differs(other: Path) -> None:
    weights = _weights(other)
    per_token = {
        name
        for name in weights
        if name.startswith("language_model.model.") and "_moe_gen" not in name and "embed_tokens" not in name
    }
    # Two norms, four projections (three with a bias), two head norms and three MLP matrices a layer; one final norm.
    assert len(per_token) == OTHER.layers * (2 + 4 + 3 + 2 + 3) + 1
    for name in per_token:
        module, _, leaf = name.rpartition(".")
        owner, _, last = module.rpartition(".")
        twin = f"{owner}_moe_gen.{last}.{leaf}" if owner.endswith(".mlp") else f"{module}_moe_gen.{leaf}"
        assert weights[twin].shape == weights[name].shape
        assert not torch.equal(weights[twin], weights[name]), name


def test_widths_are_those_asked_for(other: Path) -> None:
    weights, autoencoder = _weights(other), load_file(other / "ae.safetensors")
    assert weights["language_model.model.layers.2.self_attn.k_proj.weight"].shape == (16, 128)
    assert weights["language_model.model.layers.2.self_attn.q_norm.weight"].shape == (16,)
    assert weights["language_model.lm_head.weight"].shape == (512, 128)
    assert autoencoder["decoder.conv_in.weight"].shape == (128, 16, 3, 3)
    assert autoencoder["decoder.conv_out.weight"].shape == (3, 64, 3, 3)
    assert autoencoder["encoder.conv_out.weight"].shape == (32, 128, 3, 3)
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert {tensor.dtype for tensor in autoencoder.values()} == {torch.float32}


def test_config_can_state_a_stale_latent_size(other: Path) -> None:
    assert _fields(other, "config.json")["max_latent_size"] == 64
    assert _weights(other)["latent_pos_embed.pos_embed"].shape == (32 * 32, 128)
    assert Checkpoint(other).config.latent.max_side == 512


def test_the_models_own_loader_takes_it(default: Path, other: Path) -> None:
    for directory in (default, other):
        bagel = Checkpoint(directory).load_bagel(torch.device("cpu"), torch.float32)
        assert all(bool(tensor.isfinite().all()) for tensor in bagel.state_dict().values())


def test_shards_hold_every_tensor_once(other: Path, tmp_path: Path) -> None:
    single = tmp_path / "single"
    tiny_checkpoint.write(single, replace(OTHER, shards=1))
    files = sorted(path.name for path in other.glob("ema*"))
    assert files == [f"ema-{shard:05d}-of-00003.safetensors" for shard in (1, 2, 3)]
    assert sum(len(load_file(other / name)) for name in files) == len(_weights(other))
    whole = _weights(single)
    assert all(torch.equal(tensor, whole[name]) for name, tensor in _weights(other).items())
    index = _fields(other, "model.safetensors.index.json")
    assert index["metadata"] == {"total_size": sum(tensor.nbytes for tensor in whole.values())}


def test_the_seed_decides_every_byte(default: Path, tmp_path: Path) -> None:
    tiny_checkpoint.write(tmp_path / "again", TinyConfig())
    tiny_checkpoint.write(tmp_path / "changed", TinyConfig(seed=1))
    for path in default.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name
    for name in ("ema.safetensors", "ae.safetensors"):
        assert (default / name).read_bytes() != (tmp_path / "changed" / name).read_bytes()


def test_images_are_neither_flat_nor_black_and_white(default: Path, other: Path) -> None:
    latent = torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    for directory in (default, other):
        pixels = decode(Checkpoint(directory).load_autoencoder(torch.device("cpu"), torch.float32), latent)
        assert 20 < pixels.float().std() < 80
        assert ((pixels == 0) | (pixels == 255)).float().mean() < 0.1


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("kv_heads", 3, "a divisor of heads=4"),
        ("heads", 0, "an integer >= 1"),
        ("hidden_size", 36, "a multiple of 4 and of 2 \\* heads = 8"),
        ("layers", 0, "an integer >= 1"),
        ("intermediate_size", -1, "an integer >= 1"),
        ("vocab_size", 287, "an integer >= 288"),
        ("vae_channels", 48, "a multiple of 32"),
        ("max_latent_size", 0, "an integer >= 1"),
        ("stale_max_latent_size", 0, "an integer >= 1"),
        ("shards", 0, "an integer >= 1"),
        ("seed", -1, "an integer from 0"),
    ],
)
def test_a_bad_width_is_named_with_its_value(field: str, value: int, allowed: str) -> None:
    with pytest.raises(ConfigError, match=f"^{field}={value} is not allowed; allowed: {allowed}"):
        TinyConfig(**{field: value})


def _run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    tiny_checkpoint.add_arguments(parser)
    return tiny_checkpoint.run(parser.parse_args(arguments))


def test_command_writes_what_its_options_say(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(str(tmp_path / "new" / "c"), "--layers", "1", "--heads", "2", "--kv-heads", "1") == 0
    fields = _fields(tmp_path / "new" / "c", "llm_config.json")
    assert (fields["num_hidden_layers"], fields["num_attention_heads"], fields["num_key_value_heads"]) == (1, 2, 1)
    assert str(tmp_path / "new" / "c") in capsys.readouterr().out


@pytest.mark.parametrize(("option", "value"), [("--kv-heads", "3"), ("--shards", "1000")])
def test_command_leaves_nothing_behind_a_refusal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, value: str
) -> None:
    assert _run(str(tmp_path / "c"), option, value) == 1
    error = capsys.readouterr().err
    assert option.strip("-").replace("-", "_") + "=" + value in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_is_replaced_only_by_force(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "c"
    target.mkdir()
    assert _run(str(target), "--shards", "2") == 0
    before = (target / "config.json").read_bytes()
    assert _run(str(target), "--layers", "1") == 1
    assert f"{target} is not empty; --force" in capsys.readouterr().err
    assert (target / "config.json").read_bytes() == before
    assert _run(str(target), "--layers", "1", "--force") == 0
    assert _fields(target, "llm_config.json")["num_hidden_layers"] == 1
    assert [path.name for path in target.glob("ema*")] == ["ema.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_force_spares_a_folder_with_other_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "thesis.tex").write_text("years of work")
    assert _run(str(tmp_path / "c"), "--force") == 1
    assert "thesis.tex" in capsys.readouterr().err
    assert (tmp_path / "c" / "thesis.tex").read_text() == "years of work"


def test_files_are_as_readable_as_any_new_file(default: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.touch()
    assert {path.stat().st_mode for path in default.iterdir()} == {plain.stat().st_mode}
