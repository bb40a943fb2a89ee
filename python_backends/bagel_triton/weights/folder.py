"""A checkpoint folder, found from what a user names it by, and what is wrong with one that is not whole.

The published layout is that of the Hugging Face repository ByteDance-Seed/BAGEL-7B-MoT.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from bagel_triton.model.config import CheckpointError

INDEX_FILE = "model.safetensors.index.json"
WEIGHTS_FILE = "ema.safetensors"
AUTOENCODER_FILE = "ae.safetensors"
TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer_config.json")
CONFIG_FILES = ("config.json", "llm_config.json", "vit_config.json")
ARCHITECTURE = "BagelForConditionalGeneration"
HUB_NAME = "ByteDance-Seed/BAGEL-7B-MoT"
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_LFS_POINTER, _LFS_POINTER_SIZE = b"version https://git-lfs", 1024


def find_checkpoint(given: str | Path, environ: Mapping[str, str] = os.environ) -> Path:
    """The folder that ``given`` means: a folder, a repository in a Hugging Face cache, or the name of one there.

    Raises:
        CheckpointError: there is no such folder; says how to get the checkpoint.
    """
    path = Path(given)
    if path.is_dir():
        return _snapshot(path) or path
    if path.exists():
        raise CheckpointError(f"checkpoint {given} is a file; give the folder that holds {WEIGHTS_FILE}")
    if not _HUB_NAME.fullmatch(str(given)):
        raise CheckpointError(f"checkpoint {given} does not exist; {_how_to_get(HUB_NAME)}")
    home = Path(environ.get("HF_HOME") or "~/.cache/huggingface").expanduser()
    cache = Path(environ.get("HF_HUB_CACHE") or home / "hub")
    if snapshot := _snapshot(cache / f"models--{str(given).replace('/', '--')}"):
        return snapshot
    raise CheckpointError(
        f"checkpoint {given} is neither a folder nor a repository in the Hugging Face cache {cache}; "
        f"{_how_to_get(str(given))}"
    )


def checkpoint_name(directory: Path) -> str:
    """The name of the checkpoint in ``directory``: the folder's own, or its repository's in a Hugging Face cache."""
    resolved = directory.resolve()
    repository = resolved.parents[1].name if resolved.parent.name == "snapshots" else ""
    return repository.rpartition("--")[2] if repository.startswith("models--") else resolved.name


def check_folder(directory: Path) -> None:
    """Check that ``directory`` has every file of a checkpoint, and contents in place of Git LFS pointers.

    Raises:
        CheckpointError: names everything that is missing, and how to get it.
    """
    if not directory.is_dir():
        raise CheckpointError(f"checkpoint {directory} is not a folder; {_how_to_get(HUB_NAME)}")
    if cached := sorted(path.name for path in directory.glob("models--*")):
        raise CheckpointError(f"{directory} is a Hugging Face cache; give a repository in it, such as {cached[0]}")
    if (other := _architectures(directory / "config.json")) and ARCHITECTURE not in other:
        raise CheckpointError(
            f"{directory} holds another model: config.json says architectures={other}; allowed: {ARCHITECTURE}"
        )
    if missing := list(_missing(directory)):
        what = "is not a whole checkpoint" if any(directory.iterdir()) else "is empty"
        raise CheckpointError(f"{directory} {what}; missing: {', '.join(missing)}; {_how_to_get(HUB_NAME)}")
    if pointers := [path.name for path in sorted(directory.iterdir()) if _is_lfs_pointer(path)]:
        raise CheckpointError(
            f"{directory} holds Git LFS pointers in place of {', '.join(pointers)}; run `git lfs pull` there"
        )


def _snapshot(repository: Path) -> Path | None:
    """The snapshot of a cached ``repository`` that its branch main, or else its only one, is; None if it is no such."""
    snapshots = sorted(repository.glob("snapshots/*")) if repository.name.startswith("models--") else []
    main = repository / "refs" / "main"
    if main.is_file() and (chosen := repository / "snapshots" / main.read_text().strip()).is_dir():
        return chosen
    return snapshots[0] if len(snapshots) == 1 else None


def _missing(directory: Path) -> Iterator[str]:
    for name in (*CONFIG_FILES, *TOKENIZER_FILES, AUTOENCODER_FILE):
        if not (directory / name).exists():
            yield name
    if not (directory / WEIGHTS_FILE).exists() and not (directory / INDEX_FILE).exists():
        yield f"{WEIGHTS_FILE} (or {INDEX_FILE} and its shards)"


def _architectures(config: Path) -> list[str]:
    """What ``config`` says; nothing where it cannot be read, which another check reports."""
    try:
        named = json.loads(config.read_text()).get("architectures") or []
        return [str(name) for name in named]
    except (OSError, ValueError, AttributeError, TypeError):
        return []


def _is_lfs_pointer(path: Path) -> bool:
    if not path.is_file() or path.stat().st_size > _LFS_POINTER_SIZE:
        return False
    return path.read_bytes().startswith(_LFS_POINTER)


def _how_to_get(name: str) -> str:
    folder = name.rpartition("/")[2]
    return f"to download it: hf download {name} --local-dir {folder}, then give the folder {folder}"
