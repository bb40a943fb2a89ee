"""Opening a checkpoint: what is believed of its files, and what is said of a broken one."""

from __future__ import annotations

import gc
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bagel_triton.model.config import CheckpointError
from bagel_triton.weights.checkpoint import Checkpoint, inspect, stored_tensors
from bagel_triton.weights.tiny import checkpoint as tiny_checkpoint
from bagel_triton.weights.tiny.config import TinyConfig

CPU = torch.device("cpu")
INDEX = "model.safetensors.index.json"
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def broken(checkpoint_dir: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(checkpoint_dir, tmp_path / "broken"))


def _edit_json(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    fields = json.loads(path.read_text())
    edit(fields)
    path.write_text(json.dumps(fields))


def _edit_tensors(path: Path, edit: Callable[[Tensors], object]) -> None:
    tensors = load_file(path)
    edit(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def _same_weights(first: Path, second: Path) -> bool:
    ours, theirs = (Checkpoint(path).load_bagel(CPU, torch.float32).state_dict() for path in (first, second))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_geometry_is_that_of_the_files(checkpoint_dir: Path) -> None:
    config = inspect(checkpoint_dir)
    language = config.language
    assert (language.hidden_size, language.intermediate_size, language.num_layers) == (96, 160, 3)
    assert (language.num_heads, language.num_kv_heads, language.head_dim) == (6, 2, 16)
    assert (config.latent.token_channels, config.latent.stride) == (64, 16)


def test_a_stale_latent_size_is_not_believed(other_checkpoint: Path) -> None:
    assert json.loads((other_checkpoint / "config.json").read_text())["max_latent_size"] == 64
    assert inspect(other_checkpoint).latent.max_side == 20 * 16


def test_a_checkpoint_says_which_sizes_of_images_it_was_trained_on(broken: Path) -> None:
    published = inspect(broken)
    assert published.vae_resize.size(64, 64) == (512, 512)
    assert published.vit_resize.size(512, 512) == (518, 518)
    bounds = {"min_image_size": 64, "max_image_size": 96}
    _edit_json(broken / "config.json", lambda fields: fields.update(vae_image_transform=bounds))
    config = inspect(broken)
    assert config.vae_resize.size(640, 320) == (96, 48)
    assert config.vit_resize == published.vit_resize


@pytest.mark.parametrize("bounds", [{"min_image_size": 96, "max_image_size": 64}, {"min_image_size": 64}, "64"])
def test_wrong_sizes_of_images_are_refused_by_name(broken: Path, bounds: object) -> None:
    _edit_json(broken / "config.json", lambda fields: fields.update(vit_image_transform=bounds))
    with pytest.raises(CheckpointError, match=r"vit_image_transform|max_image_size"):
        inspect(broken)


def test_weights_come_out_as_they_are_stored(checkpoint_dir: Path) -> None:
    stored = load_file(checkpoint_dir / "ema.safetensors")
    loaded = Checkpoint(checkpoint_dir).load_bagel(CPU, torch.float32)
    state, seen = loaded.state_dict(), set[str]()
    for parameter, tensor in state.items():
        names = stored_tensors(parameter, tuple(tensor.shape), loaded.config.language)
        assert torch.equal(tensor, torch.cat([stored[name].float() for name in names])), parameter
        assert not tensor.requires_grad
        seen.update(names)
    assert {name for name in stored if name.startswith("language_model.")} <= seen
    layer, packed = "language_model.model.layers.1", state["language_model.model.layers.1.gen.qkv_proj.weight"]
    assert torch.equal(packed[:96], stored[f"{layer}.self_attn.q_proj_moe_gen.weight"].float())
    assert torch.equal(packed[96:128], stored[f"{layer}.self_attn.k_proj_moe_gen.weight"].float())
    assert torch.equal(packed[128:], stored[f"{layer}.self_attn.v_proj_moe_gen.weight"].float())
    assert torch.equal(state[f"{layer}.und.o_proj.weight"], stored[f"{layer}.self_attn.o_proj.weight"].float())


def test_shards_equal_the_single_file(checkpoint_dir: Path, broken: Path) -> None:
    tensors = load_file(broken / "ema.safetensors")
    (broken / "ema.safetensors").unlink()
    names = sorted(tensors)
    shards = {f"model-{n}.safetensors": names[n::3] for n in range(3)}
    for file, members in shards.items():
        save_file({name: tensors[name] for name in members}, broken / file)
    weight_map = {name: file for file, members in shards.items() for name in members}
    (broken / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert _same_weights(broken, checkpoint_dir)
    (broken / "model-1.safetensors").unlink()
    with pytest.raises(CheckpointError, match=rf"missing: model-1\.safetensors \(named by {INDEX}\)"):
        inspect(broken)


def test_a_file_whose_tensors_begin_at_odd_bytes_has_the_same_weights(checkpoint_dir: Path, broken: Path) -> None:
    for path in broken.glob("*.safetensors"):
        contents = path.read_bytes()
        length = int.from_bytes(contents[:8], "little")
        header = contents[8 : 8 + length].rstrip()
        header += b" " * (1 - len(header) % 2)
        path.write_bytes(len(header).to_bytes(8, "little") + header + contents[8 + length :])
    assert _same_weights(broken, checkpoint_dir)


def test_a_checkpoint_that_is_loaded_often_leaves_nothing(checkpoint_dir: Path) -> None:
    """Objects of Python's count, which a stage that sleeps and wakes for days would gather."""

    def load() -> int:
        tensors = Checkpoint(checkpoint_dir).load_autoencoder(CPU, torch.float32).state_dict()
        return len(tensors)

    load()
    gc.collect()
    before = sys.getallocatedblocks()
    tensors = sum(load() for _ in range(10))
    gc.collect()
    assert sys.getallocatedblocks() - before < tensors


def test_an_index_of_absent_shards_does_not_hide_the_single_file(checkpoint_dir: Path, broken: Path) -> None:
    (broken / INDEX).write_text(json.dumps({"weight_map": {"a": "elsewhere-1.safetensors"}}))
    assert _same_weights(broken, checkpoint_dir)
    (broken / INDEX).unlink()
    assert _same_weights(broken, checkpoint_dir)


@pytest.mark.parametrize(
    "name",
    [
        "llm_config.json",
        "config.json",
        "vocab.json",
        "merges.txt",
        "tokenizer_config.json",
        "ema.safetensors",
        "ae.safetensors",
    ],
)
def test_a_missing_file_is_named(broken: Path, name: str) -> None:
    (broken / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        inspect(broken)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere is not a folder"):
        inspect(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["llm_config.json", "config.json", "ema.safetensors", "ae.safetensors", INDEX])
@pytest.mark.parametrize("contents", [b"", b"{ this is no file", b"[]", b"\xff\xfe\x00\x01" * 5])
def test_a_garbage_file_is_named(broken: Path, name: str, contents: bytes) -> None:
    (broken / name).write_bytes(contents)
    with pytest.raises(CheckpointError, match=name):
        inspect(broken)


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("ema.safetensors", "language_model.model.layers.2.mlp_moe_gen.down_proj.weight"),
        ("ema.safetensors", "language_model.model.norm_moe_gen.weight"),
        ("ema.safetensors", "latent_pos_embed.pos_embed"),
        ("ema.safetensors", "time_embedder.mlp.2.bias"),
        ("ae.safetensors", "decoder.mid.attn_1.q.weight"),
        ("ae.safetensors", "decoder.conv_in.weight"),
    ],
)
def test_a_missing_tensor_is_named(broken: Path, file: str, name: str) -> None:
    _edit_tensors(broken / file, lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        inspect(broken)


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("ema.safetensors", "language_model.model.layers.0.self_attn.k_proj.weight"),
        ("ema.safetensors", "vae2llm.weight"),
        ("ae.safetensors", "decoder.mid.block_1.conv1.weight"),
    ],
)
def test_a_tensor_of_the_wrong_shape_is_named_with_both_shapes(broken: Path, file: str, name: str) -> None:
    shape = list(load_file(broken / file)[name].shape)
    _edit_tensors(broken / file, lambda tensors: tensors.update({name: tensors[name][:-1]}))
    with pytest.raises(CheckpointError) as error:
        inspect(broken)
    for part in (name, str([shape[0] - 1, *shape[1:]]), str(shape)):
        assert part in str(error.value)


def test_a_position_table_that_is_no_square_is_named(broken: Path) -> None:
    name = "latent_pos_embed.pos_embed"
    _edit_tensors(broken / "ema.safetensors", lambda tensors: tensors.update({name: tensors[name][:-1]}))
    with pytest.raises(CheckpointError, match=r"latent_pos_embed\.pos_embed has \d+ rows, which is no square"):
        inspect(broken)


@pytest.mark.parametrize("field", ["hidden_size", "num_key_value_heads", "rope_theta", "vocab_size"])
def test_a_missing_field_is_named(broken: Path, field: str) -> None:
    _edit_json(broken / "llm_config.json", lambda fields: fields.pop(field))
    with pytest.raises(CheckpointError, match=f"llm_config.json has no field {field}"):
        inspect(broken)


@pytest.mark.parametrize(
    ("file", "field", "value"),
    [
        ("llm_config.json", "hidden_size", "wide"),
        ("llm_config.json", "hidden_size", None),
        ("llm_config.json", "num_attention_heads", 0),
        ("llm_config.json", "num_key_value_heads", 0),
        ("llm_config.json", "num_key_value_heads", 4),
        ("config.json", "latent_patch_size", "two"),
        ("config.json", "vae_config", None),
        ("llm_config.json", "head_dim", 15),
        ("llm_config.json", "num_hidden_layers", 2),  # of three that it holds
        ("vit_config.json", "num_hidden_layers", 4),  # it holds two, one fewer than 3
        ("llm_config.json", "hidden_act", "gelu"),
        ("llm_config.json", "rope_scaling", {"type": "yarn", "factor": 4.0}),
        ("llm_config.json", "use_sliding_window", True),
        ("vit_config.json", "hidden_act", "quick_gelu"),
        ("config.json", "connector_act", "relu"),
        ("config.json", "interpolate_pos", True),
        ("config.json", "visual_gen", False),
    ],
)
def test_a_field_that_makes_no_sense_is_named(broken: Path, file: str, field: str, value: object) -> None:
    _edit_json(broken / file, lambda fields: fields.update({field: value}))
    with pytest.raises(CheckpointError, match=rf"{file}.*{field}"):
        inspect(broken)


def test_the_autoencoders_widths_are_those_of_its_tensors(other_checkpoint: Path, checkpoint_dir: Path) -> None:
    for directory, widths in ((checkpoint_dir, (32, 64)), (other_checkpoint, (64, 128))):
        decoder = Checkpoint(directory).load_autoencoder(CPU, torch.float32).decoder
        assert (decoder.conv_out.in_channels, decoder.conv_in.out_channels) == widths


def resident(path: Path) -> int:
    """Bytes of a file that this process has mapped pages of."""
    size, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            ours = line.endswith(str(path))
        elif ours and line.startswith("Rss:"):
            size += int(line.split()[1]) * 1024
    return size


@pytest.mark.parametrize("form", [None, "int8"])
def test_a_load_that_converts_holds_no_pages_of_the_file(tmp_path: Path, form: str | None) -> None:
    """The peak of a load is what it makes, and a layer of the file."""
    tiny_checkpoint.write(tmp_path / "wide", TinyConfig(hidden_size=256, intermediate_size=704, layers=4))
    checkpoint, path = Checkpoint(tmp_path / "wide"), tmp_path / "wide" / "ema.safetensors"
    loaded = checkpoint.load_bagel(CPU, torch.float32, quantization=form)
    assert resident(path) < 0.3 * path.stat().st_size  # the kernel maps pages around those that are read, too
    again = checkpoint.load_bagel(CPU, torch.float32, quantization=form).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in loaded.state_dict().items())
