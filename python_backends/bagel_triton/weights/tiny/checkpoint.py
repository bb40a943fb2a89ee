"""``bagel-triton tiny-checkpoint``: a random-weight checkpoint in the published layout.

It has every file and tensor of BAGEL-7B-MoT at widths that a laptop runs in seconds, so
that the whole server can be tried and tested without the real weights.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import uuid
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from bagel_triton.deploy.config import ConfigError
from bagel_triton.model.bagel import MAX_PERIOD, TIMESTEP_CHANNELS
from bagel_triton.weights.folder import AUTOENCODER_FILE, INDEX_FILE, TOKENIZER_FILES, WEIGHTS_FILE
from bagel_triton.weights.tiny import tokenizer as tiny_tokenizer
from bagel_triton.weights.tiny.config import (
    CONFIG_FILES,
    LATENT_PATCH,
    VIT_HIDDEN_SIZE,
    VIT_INTERMEDIATE_SIZE,
    VIT_LAYERS_DECLARED,
    VIT_PATCH,
    VIT_SIDE_PATCHES,
    Z_CHANNELS,
    TinyConfig,
    json_files,
)

OWN_FILES = {INDEX_FILE, *TOKENIZER_FILES, *CONFIG_FILES}
# Gain of each expert's values; an expert is known by its names' suffix, none for the understanding one. A prompt is a
# few tokens among an image's thousand: louder values let it change more than the last bit of a pixel.
VALUE_GAINS = {"": 4.0, "_moe_gen": 1.0}
LATENT_DIM = LATENT_PATCH * LATENT_PATCH * Z_CHANNELS
EMBEDDING_STD = 0.5
NOISE_STD = 0.1
BIAS_STD = 0.02
# Logits with some spread make greedy decoding independent of rounding.
LOGIT_GAIN = 2.2
# Pixels are (x + 1) / 2 of this layer's output: a third of the range is one standard deviation.
PIXEL_GAIN = 0.6


class _Weights:
    """Tensors drawn one after the other from one seeded generator."""

    def __init__(self, seed: int) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._generator = torch.Generator("cpu").manual_seed(seed)

    def normal(self, name: str, shape: tuple[int, ...], std: float, mean: float = 0.0) -> None:
        self.tensors[name] = torch.randn(shape, generator=self._generator) * std + mean

    def linear(self, name: str, out_width: int, in_width: int, *, bias: bool = True, gain: float = 1.0) -> None:
        self._affine(name, (out_width, in_width), in_width, bias, gain)

    def conv(self, name: str, out_width: int, in_width: int, kernel: int = 3, *, gain: float = 1.0) -> None:
        self._affine(name, (out_width, in_width, kernel, kernel), in_width * kernel * kernel, True, gain)

    def norm(self, name: str, width: int, *, bias: bool) -> None:
        self.normal(f"{name}.weight", (width,), NOISE_STD, mean=1.0)
        if bias:
            self.normal(f"{name}.bias", (width,), BIAS_STD)

    def _affine(self, name: str, shape: tuple[int, ...], fan_in: int, bias: bool, gain: float) -> None:
        self.normal(f"{name}.weight", shape, gain * fan_in**-0.5)
        if bias:
            self.normal(f"{name}.bias", shape[:1], BIAS_STD)


def bagel_tensors(config: TinyConfig) -> dict[str, Tensor]:
    """The transformer, the vision tower and the layers between them, by name, in bfloat16."""
    weights = _Weights(config.seed)
    _language_model(weights, config)
    _vision_model(weights)
    hidden = config.hidden_size
    weights.linear("connector.fc1", hidden, VIT_HIDDEN_SIZE)
    weights.linear("connector.fc2", hidden, hidden)
    weights.linear("time_embedder.mlp.0", hidden, TIMESTEP_CHANNELS)
    weights.linear("time_embedder.mlp.2", hidden, hidden)
    weights.linear("vae2llm", hidden, LATENT_DIM)
    weights.linear("llm2vae", LATENT_DIM, hidden)
    weights.tensors["latent_pos_embed.pos_embed"] = _sincos_grid(hidden, config.max_latent_size)
    weights.tensors["vit_pos_embed.pos_embed"] = _sincos_grid(hidden, VIT_SIDE_PATCHES)
    return {name: tensor.to(torch.bfloat16) for name, tensor in weights.tensors.items()}


def autoencoder_tensors(config: TinyConfig) -> dict[str, Tensor]:
    """The autoencoder's encoder and decoder, by name, in float32."""
    weights = _Weights(config.seed)
    _encoder(weights, config.vae_widths)
    _decoder(weights, config.vae_widths)
    return weights.tensors


def _language_model(weights: _Weights, config: TinyConfig) -> None:
    hidden, kv_width = config.hidden_size, config.kv_heads * config.head_dim
    weights.normal("language_model.model.embed_tokens.weight", (config.vocab_size, hidden), EMBEDDING_STD)
    for index in range(config.layers):
        layer = f"language_model.model.layers.{index}"
        for expert in VALUE_GAINS:
            weights.norm(f"{layer}.input_layernorm{expert}", hidden, bias=False)
            weights.norm(f"{layer}.post_attention_layernorm{expert}", hidden, bias=False)
            weights.linear(f"{layer}.self_attn.q_proj{expert}", hidden, hidden)
            weights.linear(f"{layer}.self_attn.k_proj{expert}", kv_width, hidden)
            weights.linear(f"{layer}.self_attn.v_proj{expert}", kv_width, hidden, gain=VALUE_GAINS[expert])
            weights.linear(f"{layer}.self_attn.o_proj{expert}", hidden, hidden, bias=False)
            weights.norm(f"{layer}.self_attn.q_norm{expert}", config.head_dim, bias=False)
            weights.norm(f"{layer}.self_attn.k_norm{expert}", config.head_dim, bias=False)
            weights.linear(f"{layer}.mlp{expert}.gate_proj", config.intermediate_size, hidden, bias=False)
            weights.linear(f"{layer}.mlp{expert}.up_proj", config.intermediate_size, hidden, bias=False)
            weights.linear(f"{layer}.mlp{expert}.down_proj", hidden, config.intermediate_size, bias=False)
    for expert in VALUE_GAINS:
        weights.norm(f"language_model.model.norm{expert}", hidden, bias=False)
    weights.linear("language_model.lm_head", config.vocab_size, hidden, bias=False, gain=LOGIT_GAIN)


def _vision_model(weights: _Weights) -> None:
    hidden, tower = VIT_HIDDEN_SIZE, "vit_model.vision_model"
    weights.linear(f"{tower}.embeddings.patch_embedding", hidden, 3 * VIT_PATCH * VIT_PATCH)
    weights.normal(f"{tower}.embeddings.position_embedding.weight", (VIT_SIDE_PATCHES**2, hidden), hidden**-0.5)
    for index in range(VIT_LAYERS_DECLARED - 1):
        layer = f"{tower}.encoder.layers.{index}"
        weights.norm(f"{layer}.layer_norm1", hidden, bias=True)
        weights.norm(f"{layer}.layer_norm2", hidden, bias=True)
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            weights.linear(f"{layer}.self_attn.{projection}", hidden, hidden)
        weights.linear(f"{layer}.mlp.fc1", VIT_INTERMEDIATE_SIZE, hidden)
        weights.linear(f"{layer}.mlp.fc2", hidden, VIT_INTERMEDIATE_SIZE)
    weights.norm(f"{tower}.post_layernorm", hidden, bias=True)


def _sincos_grid(width: int, side: int) -> Tensor:
    """Two-dimensional sinusoidal positions, ``[side * side, width]``, rows of the grid first."""
    frequencies = MAX_PERIOD ** (-torch.arange(width // 4) / (width // 4))
    angles = torch.arange(side)[:, None] * frequencies
    waves = torch.cat([angles.sin(), angles.cos()], dim=-1)
    rows = waves[:, None, :].expand(side, side, -1)
    columns = waves[None, :, :].expand(side, side, -1)
    return torch.cat([columns, rows], dim=-1).reshape(side * side, width)


def _encoder(weights: _Weights, widths: tuple[int, ...]) -> None:
    weights.conv("encoder.conv_in", widths[0], 3)
    width = widths[0]
    for level, out_width in enumerate(widths):
        _resnet_block(weights, f"encoder.down.{level}.block.0", out_width, width)
        width = out_width
        if level < len(widths) - 1:
            weights.conv(f"encoder.down.{level}.downsample.conv", width, width)
    _middle(weights, "encoder.mid", width)
    weights.norm("encoder.norm_out", width, bias=True)
    # Mean and log-variance of the posterior.
    weights.conv("encoder.conv_out", 2 * Z_CHANNELS, width)


def _decoder(weights: _Weights, widths: tuple[int, ...]) -> None:
    width = widths[-1]
    weights.conv("decoder.conv_in", width, Z_CHANNELS)
    _middle(weights, "decoder.mid", width)
    for level, out_width in reversed(list(enumerate(widths))):
        # One residual block more than the encoder has at the level.
        for block in range(2):
            _resnet_block(weights, f"decoder.up.{level}.block.{block}", out_width, width)
            width = out_width
        if level > 0:
            weights.conv(f"decoder.up.{level}.upsample.conv", width, width)
    weights.norm("decoder.norm_out", width, bias=True)
    weights.conv("decoder.conv_out", 3, width, gain=PIXEL_GAIN)


def _middle(weights: _Weights, name: str, width: int) -> None:
    _resnet_block(weights, f"{name}.block_1", width, width)
    weights.norm(f"{name}.attn_1.norm", width, bias=True)
    _pointwise(weights, (f"{name}.attn_1.{part}" for part in ("q", "k", "v", "proj_out")), width, width)
    _resnet_block(weights, f"{name}.block_2", width, width)


def _resnet_block(weights: _Weights, name: str, out_width: int, in_width: int) -> None:
    weights.norm(f"{name}.norm1", in_width, bias=True)
    weights.conv(f"{name}.conv1", out_width, in_width)
    weights.norm(f"{name}.norm2", out_width, bias=True)
    weights.conv(f"{name}.conv2", out_width, out_width)
    if in_width != out_width:
        _pointwise(weights, [f"{name}.nin_shortcut"], out_width, in_width)


def _pointwise(weights: _Weights, names: Iterable[str], out_width: int, in_width: int) -> None:
    for name in names:
        weights.conv(name, out_width, in_width, kernel=1)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments: the folder and one option per field of :class:`TinyConfig`."""
    parser.add_argument("directory", metavar="DIR", type=Path, help="folder to write")
    for option in fields(TinyConfig):
        format_value = "" if option.default is None else " (default: %(default)s)"
        parser.add_argument(
            "--" + option.name.replace("_", "-"),
            type=int,
            metavar="N",
            default=option.default,
            help=option.metadata["help"] + format_value,
        )
    parser.add_argument("--force", action="store_true", help="replace the checkpoint that DIR already holds")


def run(args: argparse.Namespace) -> int:
    """Write the checkpoint that ``args`` describe; the exit status (1 after a one-line error)."""
    try:
        config = TinyConfig(**{option.name: getattr(args, option.name) for option in fields(TinyConfig)})
        write(args.directory, config, force=args.force)
    except (ConfigError, OSError) as error:
        print(f"bagel-triton: error: {error}", file=sys.stderr)
        return 1
    size = sum(path.stat().st_size for path in args.directory.iterdir())
    print(f"wrote {args.directory} ({size / 1e6:.1f} MB)")
    return 0


def write(directory: Path, config: TinyConfig, *, force: bool = False) -> None:
    """Write a checkpoint to ``directory``, which appears complete or not at all.

    Args:
        directory: new or empty; with ``force`` it may hold a checkpoint, which is replaced.

    Raises:
        FileExistsError: ``directory`` holds something that is not to be replaced.
        ConfigError: more shards than tensors.
        OSError: the folder cannot be written.
    """
    target = directory.resolve()
    _check_free(target, force)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}.partial")
    partial.mkdir()
    try:
        _write_files(partial, config)
        _swap(partial, target)
    except BaseException:
        if partial.exists():
            shutil.rmtree(partial)
        raise


def _check_free(target: Path, force: bool) -> None:
    if not target.exists():
        return
    names = sorted(path.name for path in target.iterdir())
    if names and not force:
        raise FileExistsError(f"{target} is not empty; --force replaces the checkpoint in it")
    # In a mistyped folder nothing but a checkpoint of this kind may be lost.
    if strays := [name for name in names if name not in OWN_FILES and not name.endswith(".safetensors")]:
        raise FileExistsError(f"{target} holds {strays[0]}, which is no file of a tiny checkpoint: not replaced")


def _write_files(directory: Path, config: TinyConfig) -> None:
    token_ids = tiny_tokenizer.write(directory, config.vocab_size)
    for name, contents in json_files(config, token_ids).items():
        _write_json(directory / name, contents)
    _write_sharded(directory, bagel_tensors(config), config.shards)
    _save(autoencoder_tensors(config), directory / AUTOENCODER_FILE)


def _write_sharded(directory: Path, tensors: dict[str, Tensor], count: int) -> None:
    """Write ``tensors`` as ``count`` files of about equal size, and their index."""
    if count > len(tensors):
        raise ConfigError(f"shards={count} is not allowed; allowed: 1 to {len(tensors)}, the number of tensors")
    files = [f"ema-{shard:05d}-of-{count:05d}.safetensors" for shard in range(1, count + 1)]
    if count == 1:
        files = [WEIGHTS_FILE]
    shards: list[dict[str, Tensor]] = [{} for _ in files]
    sizes = [0] * count
    for name in sorted(tensors, key=lambda name: (-tensors[name].nbytes, name)):
        smallest = sizes.index(min(sizes))
        shards[smallest][name] = tensors[name]
        sizes[smallest] += tensors[name].nbytes
    for file, shard in zip(files, shards, strict=True):
        _save(shard, directory / file)
    weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
    index = {"metadata": {"total_size": sum(sizes)}, "weight_map": dict(sorted(weight_map.items()))}
    _write_json(directory / INDEX_FILE, index)


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    # The library's file writer makes files for their owner alone, which a container's user could not read.
    path.write_bytes(save(tensors, metadata={"format": "pt"}))


def _write_json(path: Path, contents: dict[str, object]) -> None:
    path.write_text(json.dumps(contents, indent=2) + "\n")


def _swap(partial: Path, target: Path) -> None:
    """Rename ``partial`` to ``target``, which is absent, empty or a checkpoint to be replaced."""
    if not target.exists():
        partial.rename(target)
        return
    # A rename cannot replace a folder that is not empty, so the old one is renamed first, and back on failure.
    old = target.with_name(f".{target.name}.{uuid.uuid4().hex}.old")
    target.rename(old)
    try:
        partial.rename(target)
    except BaseException:
        old.rename(target)
        raise
    shutil.rmtree(old)
