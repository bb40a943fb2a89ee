"""The files of a checkpoint folder, and the errors of an incomplete one.

The published layout is that of the Hugging Face repository ByteDance-Seed/BAGEL-7B-MoT.
"""

from __future__ import annotations

import json
from pathlib import Path

from bagel_triton.model.config import CheckpointError

INDEX_FILE = "model.safetensors.index.json"
WEIGHTS_FILE = "ema.safetensors"
AUTOENCODER_FILE = "ae.safetensors"
TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer_config.json")
CONFIG_FILES = ("config.json", "llm_config.json", "vit_config.json")
ARCHITECTURE = "BagelForConditionalGeneration"
HUB_NAME = "ByteDance-Seed/BAGEL-7B-MoT"
_LFS_POINTER, _LFS_POINTER_SIZE = b"version https://git-lfs", 1024


def check_folder(directory: Path) -> None:
    """Check that ``directory`` has every file of a checkpoint, and contents in place of Git LFS pointers.

    Raises:
        CheckpointError: names everything that is missing, and how to get it.
    """
    if not directory.is_dir():
        raise CheckpointError(f"checkpoint {directory} is not a folder; {how_to_get(HUB_NAME)}")
    if cached := sorted(path.name for path in directory.glob("models--*")):
        raise CheckpointError(f"{directory} is a Hugging Face cache; give a repository in it, such as {cached[0]}")
    if (other := _architectures(directory / "config.json")) and ARCHITECTURE not in other:
        raise CheckpointError(
            f"{directory} holds another model: config.json says architectures={other}; allowed: {ARCHITECTURE}"
        )
    missing = missing_files(directory)
    if missing and (directory / "adapter_config.json").exists():
        raise CheckpointError(
            f"{directory} holds an adapter (adapter_config.json): name it in --lora-path, beside a checkpoint"
        )
    if missing and (gguf := sorted(path.name for path in directory.glob("*.gguf"))):
        raise CheckpointError(f"{directory} holds GGUF files ({gguf[0]}), which are not read; {how_to_get(HUB_NAME)}")
    if missing:
        what = "is not a whole checkpoint" if any(directory.iterdir()) else "is empty"
        raise CheckpointError(f"{directory} {what}; missing: {', '.join(missing)}; {how_to_get(HUB_NAME)}")
    if pointers := [path.name for path in sorted(directory.iterdir()) if _is_lfs_pointer(path)]:
        raise CheckpointError(
            f"{directory} holds Git LFS pointers in place of {', '.join(pointers)}; run `git lfs pull` there"
        )


def missing_files(directory: Path) -> list[str]:
    """The names of a checkpoint's files that ``directory`` does not have as files; links are followed."""
    missing = [name for name in (*CONFIG_FILES, *TOKENIZER_FILES, AUTOENCODER_FILE) if not (directory / name).is_file()]
    if (directory / WEIGHTS_FILE).is_file():
        return missing
    if not (directory / INDEX_FILE).is_file():
        return [*missing, f"{WEIGHTS_FILE} (or {INDEX_FILE} and its shards)"]
    shards = [name for name in index_files(directory / INDEX_FILE) if not (directory / name).is_file()]
    return [*missing, *(f"{name} (named by {INDEX_FILE})" for name in shards)]


def index_files(index: Path) -> list[str]:
    """The names of the weight files that ``index`` names, sorted.

    Raises:
        CheckpointError: it is no index, or it names something outside its folder.
    """
    try:
        weight_map = json.loads(index.read_text("utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
    except (OSError, ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{index} has no weight_map of tensors and their files") from error
    names = [name for name in names if name != AUTOENCODER_FILE]  # it is read by its own name
    if not names:
        raise CheckpointError(f"{index} has no tensor in its weight_map")
    for name in names:
        if not isinstance(name, str) or name != Path(name).name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{index} names the file {name!r}; allowed: a .safetensors file beside it")
    return names


def _architectures(config: Path) -> list[str]:
    """The architectures in ``config``; none if it cannot be read, which another check reports."""
    try:
        named = json.loads(config.read_text("utf-8")).get("architectures") or []
        return [str(name) for name in named]
    except (OSError, ValueError, AttributeError, TypeError, RecursionError):
        return []


def _is_lfs_pointer(path: Path) -> bool:
    if not path.is_file() or path.stat().st_size > _LFS_POINTER_SIZE:
        return False
    return path.read_bytes().startswith(_LFS_POINTER)


def how_to_get(name: str) -> str:
    """Advice for downloading the repository ``name``, for the end of an error's line."""
    folder = name.rpartition("/")[2]
    return f"to download it: hf download {name} --local-dir {folder}, then give the folder {folder}"
