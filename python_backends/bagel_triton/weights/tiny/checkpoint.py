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
from dataclasses import fields
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from bagel_triton.deploy.config import ConfigError
from bagel_triton.weights.folder import AUTOENCODER_FILE, INDEX_FILE, TOKENIZER_FILES, WEIGHTS_FILE
from bagel_triton.weights.tiny import tokenizer as tiny_tokenizer
from bagel_triton.weights.tiny.config import CONFIG_FILES, TinyConfig, json_files
from bagel_triton.weights.tiny.tensors import autoencoder_tensors, bagel_tensors

OWN_FILES = {INDEX_FILE, *TOKENIZER_FILES, *CONFIG_FILES}


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
