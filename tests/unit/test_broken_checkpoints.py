"""What is said of checkpoints that are broken, quantised, of something else, or made to break the reader: one line."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bagel_triton.model.config import CheckpointError
from bagel_triton.weights.checkpoint import Checkpoint
from bagel_triton.weights.sharing import WeightStore, on_device

CHECKPOINT = Path(__file__).parents[1] / "data" / "tiny-a"
CPU = torch.device("cpu")
EMA, AE, INDEX = "ema.safetensors", "ae.safetensors", "model.safetensors.index.json"
LAYER = "language_model.model.layers.1"
EMBEDDING = "language_model.model.embed_tokens.weight"
VIT = "vit_model.vision_model"
Tensors = dict[str, torch.Tensor]
Damage = Callable[[Path], object]


def tensors(edit: Callable[[Tensors], object], file: str = EMA) -> Damage:
    """Change the tensors of a file."""

    def damage(folder: Path) -> None:
        held = load_file(folder / file)
        edit(held)
        save_file({name: tensor.contiguous() for name, tensor in held.items()}, folder / file)

    return damage


def stored(name: str, dtype: torch.dtype, file: str = EMA) -> Damage:
    return tensors(lambda held: held.update({name: held[name].to(dtype)}), file)


def extra(name: str, file: str = EMA, dtype: torch.dtype = torch.float32) -> Damage:
    return tensors(lambda held: held.update({name: torch.ones(3, dtype=dtype)}), file)


def renamed(change: Callable[[str], str], file: str = EMA) -> Damage:
    def edit(held: Tensors) -> None:
        changed = {change(name): tensor for name, tensor in held.items()}
        held.clear()
        held.update(changed)

    return tensors(edit, file)


def without(begin: str, file: str = EMA) -> Damage:
    return tensors(lambda held: [held.pop(name) for name in list(held) if name.startswith(begin)], file)


def value(name: str, number: float, file: str = EMA) -> Damage:
    def edit(held: Tensors) -> None:
        held[name].view(-1)[7] = number

    return tensors(edit, file)


def raw(file: str, contents: bytes) -> Damage:
    return lambda folder: (folder / file).write_bytes(contents)


def cut(file: str, keep: Callable[[int], int]) -> Damage:
    return lambda folder: (folder / file).write_bytes(
        (folder / file).read_bytes()[: keep((folder / file).stat().st_size)]
    )


def field(file: str, **changes: Any) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / file
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return damage


def index(weight_map: object) -> Damage:
    def damage(folder: Path) -> None:
        (folder / EMA).rename(folder / "ema-1.safetensors")
        (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))

    return damage


def twice(folder: Path) -> None:
    held = load_file(folder / EMA)
    (folder / EMA).unlink()
    save_file(held, folder / "ema-1.safetensors")
    save_file({EMBEDDING: held[EMBEDDING]}, folder / "ema-2.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "ema-1.safetensors", "b": "ema-2.safetensors"}}))


def header(entries: dict[str, Any], data: bytes = b"") -> bytes:
    head = json.dumps(entries).encode()
    return struct.pack("<Q", len(head)) + head + data


def adapter(folder: Path) -> None:
    (folder / EMA).unlink()
    (folder / "adapter_config.json").write_text("{}")


def gguf(folder: Path) -> None:
    (folder / EMA).rename(folder / "bagel-q4_0.gguf")
    (folder / INDEX).unlink(missing_ok=True)


NO_QUANTISED = "and ByteDance-Seed/BAGEL-7B-MoT in bfloat16, which --quantization quantises while it is loaded"
# Found by the headers, before a server starts.
HEADERS: dict[str, tuple[Damage, tuple[str, ...]]] = {
    # quantised
    "int8": (stored(f"{LAYER}.mlp.up_proj.weight", torch.int8), (EMA, "mlp.up_proj.weight", "I8", NO_QUANTISED)),
    "uint8": (stored(f"{LAYER}.mlp.up_proj.weight", torch.uint8), (EMA, "mlp.up_proj.weight", "U8", NO_QUANTISED)),
    "int32": (stored(f"{LAYER}.mlp.up_proj.weight", torch.int32), (EMA, "I32", NO_QUANTISED)),
    "float8 e4m3": (stored(EMBEDDING, torch.float8_e4m3fn), (EMA, EMBEDDING, "F8_E4M3", NO_QUANTISED)),
    "float8 e5m2": (stored(EMBEDDING, torch.float8_e5m2), (EMA, EMBEDDING, "F8_E5M2", NO_QUANTISED)),
    "float8 autoencoder": (stored("encoder.conv_in.weight", torch.float8_e5m2, AE), (AE, "F8_E5M2", NO_QUANTISED)),
    "bool": (stored(f"{LAYER}.mlp.up_proj.weight", torch.bool), (EMA, "BOOL", "allowed: BF16, F16, F32, F64")),
    "weight_scale": (extra(f"{LAYER}.mlp.up_proj.weight_scale"), (EMA, "weight_scale", NO_QUANTISED)),
    "weight_scale_inv": (
        extra(f"{LAYER}.mlp.up_proj.weight_scale_inv"),
        ("weight_scale_inv", "blocks of float8", NO_QUANTISED),
    ),
    "input_scale": (extra("llm2vae.input_scale"), ("llm2vae.input_scale", NO_QUANTISED)),
    "absmax": (extra("llm2vae.weight.absmax"), ("llm2vae.weight.absmax", "bitsandbytes in four bits", NO_QUANTISED)),
    "quant_state": (
        extra("llm2vae.weight.quant_state.bitsandbytes__nf4", dtype=torch.uint8),
        ("quant_state", NO_QUANTISED),
    ),
    "SCB": (extra("llm2vae.weight.SCB"), ("llm2vae.weight.SCB", "bitsandbytes in int8", NO_QUANTISED)),
    "gptq": (
        renamed(lambda name: name.replace("up_proj.weight", "up_proj.qweight")),
        (EMA, "up_proj.qweight", "GPTQ or AWQ", NO_QUANTISED),
    ),
    "dfloat11": (
        extra(f"{LAYER}.mlp.up_proj.encoded_exponent", dtype=torch.uint8),
        (EMA, "weights quantised by DFloat11", NO_QUANTISED),
    ),
    "dfloat11_config": (
        field("config.json", dfloat11_config={"version": "0.2.0"}),
        ("config.json has a dfloat11_config", NO_QUANTISED),
    ),
    "gguf": (gguf, ("holds GGUF files (bagel-q4_0.gguf), which are not read",)),
    "compressed-tensors in blocks": (
        field(
            "config.json", quantization_config={"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}
        ),
        ("format='nvfp4-pack-quantized'", NO_QUANTISED),
    ),
    "scaled_fp8": (extra("scaled_fp8"), (EMA, "scaled_fp8", "ComfyUI in float8", NO_QUANTISED)),
    "autoencoder scale": (extra("decoder.conv_in.scale_weight", AE), (AE, "scale_weight", NO_QUANTISED)),
    "quantization_config": (
        field("config.json", quantization_config={"quant_method": "fp8"}),
        ("config.json: quantization_config is that of quant_method='fp8'", NO_QUANTISED),
    ),
    "quantization_config of llm": (
        field("llm_config.json", quantization_config={"bits": 4}),
        ("llm_config.json: quantization_config is that of quant_method=None", NO_QUANTISED),
    ),
    # adapters and fine-tunes
    "lora tensors": (extra(f"{LAYER}.self_attn.q_proj.lora_A.weight"), (EMA, "holds an adapter", "merge it")),
    "adapter folder": (adapter, ("holds an adapter (adapter_config.json)",)),
    "no ViT": (
        lambda folder: [without(part)(folder) for part in ("vit_model.", "connector.", "vit_pos_embed.")],
        (
            EMA,
            "has no tensors vit_model.*, connector.*, vit_pos_embed.pos_embed;",
            "the checkpoint that this one was tuned from",
        ),
    ),
    "no connector": (without("connector."), (EMA, "has no tensors connector.*")),
    "no flow head": (without("llm2vae."), (EMA, "has no tensors llm2vae.*")),
    "no encoder": (without("encoder.", AE), (AE, "has no tensors encoder.*")),
    "no generation expert": (
        tensors(lambda held: [held.pop(name) for name in list(held) if "_moe_gen" in name]),
        (EMA, "has no tensor language_model.model.layers.0.gen".replace(".gen", ".input_layernorm_moe_gen"), "more"),
    ),
    "language model alone": (
        lambda folder: [without(part)(folder) for part in ("vi", "connector", "latent", "vae2", "llm2", "time")],
        (EMA, "has no tensors vit_model.*, connector.*"),
    ),
    # prefixed, missing, extra
    "prefix module": (renamed(lambda name: f"module.{name}"), (EMA, "names of tensors begin with 'module.'")),
    "prefix of two": (renamed(lambda name: f"_orig_mod.bagel.{name}"), ("begin with '_orig_mod.bagel.'",)),
    "prefix vae": (renamed(lambda name: f"vae.{name}", AE), (AE, "names of tensors begin with 'vae.'")),
    "infix": (
        renamed(lambda name: name.replace("layers.1.", "layers.1._fsdp_wrapped_module.")),
        (EMA, f"has no tensor {LAYER}.", " more; nearest: ", "_fsdp_wrapped_module"),
    ),
    "misspelt": (
        renamed(lambda name: name.replace(f"{LAYER}.mlp.up_proj", f"{LAYER}.mlp.up_prj")),
        (EMA, f"has no tensor {LAYER}.mlp.up_proj.weight; nearest: {LAYER}.mlp.up_prj.weight"),
    ),
    "diffusers autoencoder": (
        renamed(lambda name: name.replace(".mid.block_1.", ".mid_block.resnets.0."), AE),
        (AE, "has no tensor encoder.mid.block_1", "nearest: encoder.mid_block.resnets.0."),
    ),
    "quant_conv": (extra("quant_conv.weight", AE), (AE, "tensor quant_conv.weight is not one of BAGEL's")),
    "extra bias": (
        extra(f"{LAYER}.mlp.up_proj.bias"),
        (EMA, f"tensor {LAYER}.mlp.up_proj.bias is not one of BAGEL's; nearest: {LAYER}.mlp.up_proj.weight"),
    ),
    "another layer": (
        extra("language_model.model.layers.3.input_layernorm.weight"),
        ("num_hidden_layers=3", "holds 4"),
    ),
    "far layer": (
        extra("language_model.model.layers.999999.input_layernorm.weight"),
        ("has no tensors language_model.model.layers.3.*, and has layers after it",),
    ),
    "no layer 1": (without(f"{LAYER}."), ("has no tensors language_model.model.layers.1.*, and has layers after it",)),
    "no layer 0 of ViT": (without(f"{VIT}.encoder.layers.0."), (f"has no tensors {VIT}.encoder.layers.0.*",)),
    "other model": (
        lambda folder: save_file({"model.embed_tokens.weight": torch.ones(2, 2)}, folder / EMA),
        (EMA, "has no tensor of BAGEL, such as", "its first is model.embed_tokens.weight"),
    ),
    "no tensors": (raw(EMA, header({})), (EMA, "has no tensor of BAGEL")),
    "scalar position table": (
        tensors(lambda held: held.update({"latent_pos_embed.pos_embed": torch.ones(())})),
        (EMA, "latent_pos_embed.pos_embed of two dimensions"),
    ),
    "scalar autoencoder": (
        tensors(lambda held: held.update({"decoder.conv_in.weight": torch.ones(())}), AE),
        ("the autoencoder's convolutions have not four dimensions",),
    ),
    "odd autoencoder": (
        tensors(lambda held: held.update({"decoder.up.0.block.0.conv1.weight": torch.ones(33, 32, 3, 3)}), AE),
        ("the autoencoder has 33 channels; allowed: a multiple of 32",),
    ),
    "name of two lines": (extra("a\nb" + "c" * 9999), (EMA, "tensor a\\nbccc")),
    # cut off, garbled
    "cut in the data": (cut(EMA, lambda size: size - 1), (EMA, "is cut off: it has 3296671 of 3296672 bytes")),
    "cut in half": (cut(AE, lambda size: size // 2), (AE, "is cut off", "download it again")),
    "cut in the header": (cut(EMA, lambda size: 100), (EMA, "cannot be opened as safetensors")),
    "empty": (raw(EMA, b""), (EMA, "cannot be opened as safetensors")),
    "header of 2**63 bytes": (raw(EMA, b"\xff" * 7 + b"\x7f" + b"{}"), (EMA, "cannot be opened as safetensors")),
    "deep header": (raw(AE, struct.pack("<Q", 99_999) + b"[" * 99_999), (AE, "cannot be opened as safetensors")),
    "overlapping": (
        raw(EMA, header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, b"\0" * 4)),
        (EMA, "cannot be opened as safetensors"),
    ),
    "html": (raw(EMA, b"<html>404 Not Found</html>"), (EMA, "cannot be opened as safetensors")),
    "pickle": (raw(EMA, b"\x80\x02}q\x00X\x04\x00\x00\x00"), (EMA, "cannot be opened as safetensors")),
    # the index
    "index of an absent file": (
        index({"a": "ema-1.safetensors", "b": "ema-2.safetensors"}),
        (f"missing: ema-2.safetensors (named by {INDEX})",),
    ),
    "index outside": (index({"a": "../../etc/x.safetensors"}), (INDEX, "'../../etc/x.safetensors'", "beside it")),
    "index of a pickle": (index({"a": "pytorch_model.bin"}), (INDEX, "'pytorch_model.bin'")),
    "index of numbers": (index({"a": 1}), (INDEX, "names the file 1")),
    "index of lists": (index({"a": ["x"]}), (INDEX, "has no weight_map of tensors and their files")),
    "index of nothing": (index({}), (INDEX, "has no tensor in its weight_map")),
    "tensor in two files": (twice, ("ema-2.safetensors has the tensor", EMBEDDING, "and so has", "ema-1.safetensors")),
    # the configuration files
    "deep json": (raw("llm_config.json", b'{"a":' + b"[" * 100_000), ("llm_config.json cannot be read",)),
    "infinite size": (field("llm_config.json", hidden_size=math.inf), ("llm_config.json: hidden_size=inf",)),
    "infinite theta": (field("llm_config.json", rope_theta=math.inf), ("llm_config.json: rope_theta=inf",)),
    "nan": (field("llm_config.json", rms_norm_eps=math.nan), ("llm_config.json: rms_norm_eps=nan",)),
    "huge": (field("llm_config.json", hidden_size=10**30), ("hidden_size=1000000000000", "from 1 to 1048576")),
    "too large together": (
        field(
            "llm_config.json", hidden_size=2**20, num_attention_heads=2**20, num_key_value_heads=2**20, head_dim=2**20
        ),
        ("the sizes in its configuration files are too large",),
    ),
    "a thousand layers": (field("llm_config.json", num_hidden_layers=10**6), ("num_hidden_layers=1000000", "holds 3")),
    "null": (raw("vit_config.json", b"null"), ("vit_config.json is not a JSON object",)),
    "utf-16": (raw("config.json", '{"a": 1}'.encode("utf-16")), ("config.json cannot be read",)),
}
# Found while the weights are loaded.
VALUES: dict[str, tuple[Damage, tuple[str, ...]]] = {
    "nan in a packed weight": (
        value(f"{LAYER}.self_attn.k_proj_moe_gen.weight", math.nan),
        (
            EMA,
            f"tensor {LAYER}.self_attn.k_proj_moe_gen.weight has NaN or infinite values (1 of 3072, ",
            "the first at [0, 7])",
        ),
    ),
    "infinity": (
        value("vae2llm.weight", -math.inf),
        (EMA, "tensor vae2llm.weight has NaN or infinite values (1 of 6144, the first at [0, 7])"),
    ),
    "nan in a bias": (value("time_embedder.mlp.0.bias", math.nan), (EMA, "time_embedder.mlp.0.bias", "at [7]")),
    "nan in the autoencoder": (value("decoder.conv_in.bias", math.nan, AE), (AE, "decoder.conv_in.bias", "at [7]")),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint to damage."""
    copy = tmp_path / "broken"
    copy.mkdir()
    for path in CHECKPOINT.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    return copy


def assert_one_line(caught: pytest.ExceptionInfo[CheckpointError], said: tuple[str, ...]) -> None:
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) <= 1003
    for part in said:
        assert part in message


@pytest.mark.parametrize("name", HEADERS)
def test_it_is_refused_by_its_headers(folder: Path, name: str) -> None:
    damage, said = HEADERS[name]
    damage(folder)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(folder)
    assert_one_line(caught, said)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", VALUES)
def test_it_is_refused_while_it_is_loaded(folder: Path, name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    damage, said = VALUES[name]
    damage(folder)
    checkpoint = Checkpoint(folder)
    load = checkpoint.load_autoencoder if AE in said else checkpoint.load_bagel
    for shared in (None, WeightStore("test", tmp_path)):
        with pytest.raises(CheckpointError) as caught:
            load(CPU, dtype, shared)
        assert_one_line(caught, said)
    assert not [*tmp_path.glob("test_weights_*")]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_other_floats_are_read_and_their_largest_values_are_finite(folder: Path, dtype: torch.dtype) -> None:
    stored(f"{LAYER}.mlp.up_proj.weight", dtype)(folder)
    value(f"{LAYER}.mlp.up_proj.weight", torch.finfo(torch.float16).max)(folder)
    loaded = Checkpoint(folder).load_bagel(CPU, torch.float32).state_dict()[f"{LAYER}.und.mlp.gate_up_proj.weight"]
    assert loaded.max() == torch.finfo(torch.float16).max


@pytest.mark.parametrize(
    "name",
    [
        "language_model.model.rotary_emb.inv_freq",
        f"{VIT}.embeddings.position_ids",
        f"{VIT}.head.probe",
    ],
)
def test_buffers_that_training_code_saves_are_ignored(folder: Path, name: str) -> None:
    extra(name, dtype=torch.int64)(folder)
    Checkpoint(folder)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("number", [math.nan, -math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [0, 262_143, 262_144, 300_000])
def test_a_single_value_is_found_wherever_it_is(dtype: torch.dtype, number: float, at: int) -> None:
    tensor = torch.full((300_001,), -torch.finfo(dtype).max, dtype=dtype)
    assert on_device({"a": tensor}, CPU, dtype)["a"] is tensor
    tensor[at] = number
    with pytest.raises(ValueError, match="a has values that are NaN or infinite"):
        on_device({"a": tensor}, CPU, dtype)
