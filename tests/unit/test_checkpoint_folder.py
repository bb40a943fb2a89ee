"""What `serve` says of a folder that is not a whole checkpoint, and how it finds one in a Hugging Face cache."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from bagel_triton.model.config import CheckpointError
from bagel_triton.weights.folder import check_folder
from bagel_triton.weights.hub import checkpoint_name, find_checkpoint

CHECKPOINT = Path(__file__).parents[1] / "data" / "tiny-a"
REPOSITORY = "models--ByteDance-Seed--BAGEL-7B-MoT"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(CHECKPOINT, tmp_path / "checkpoint"))


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A Hugging Face cache with two snapshots of BAGEL; its branch main is at the second."""
    repository = tmp_path / "hub" / REPOSITORY
    for commit in ("aaa", "bbb"):
        (repository / "snapshots" / commit).mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("bbb")
    return tmp_path / "hub"


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        check_folder(folder)
    return str(caught.value)


def test_a_whole_folder_is_taken(folder: Path) -> None:
    check_folder(folder)


def test_everything_that_is_missing_is_named_at_once(folder: Path) -> None:
    for name in ("merges.txt", "vit_config.json", "ae.safetensors"):
        (folder / name).unlink()
    message = refusal(folder)
    assert message.startswith(f"{folder} is not a whole checkpoint; missing: vit_config.json, merges.txt, ae.safeten")
    assert "hf download ByteDance-Seed/BAGEL-7B-MoT" in message


def test_an_empty_folder_is_said_to_be_empty(tmp_path: Path) -> None:
    assert refusal(tmp_path).startswith(f"{tmp_path} is empty; missing: config.json, ")


def test_git_lfs_pointers_are_recognised(folder: Path) -> None:
    (folder / "ae.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "Git LFS pointers in place of ae.safetensors; run `git lfs pull` there" in refusal(folder)


def test_another_model_is_refused_by_its_architecture(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForCausalLM"]}))
    message = refusal(folder)
    assert "config.json says architectures=['LlamaForCausalLM']; allowed: BagelForConditionalGeneration" in message


def test_a_hugging_face_cache_is_recognised(cache: Path) -> None:
    assert refusal(cache).endswith(f"is a Hugging Face cache; give a repository in it, such as {REPOSITORY}")


def test_a_repository_of_a_cache_is_found_by_its_folder(cache: Path) -> None:
    snapshot = cache / REPOSITORY / "snapshots" / "bbb"
    assert find_checkpoint(cache / REPOSITORY) == snapshot
    assert checkpoint_name(snapshot) == "BAGEL-7B-MoT"


@pytest.mark.parametrize("given", ["/nowhere/at/all", "../nowhere", "nowhere", "a/b/c", "-/b"])
def test_what_is_not_there_comes_with_how_to_get_it(given: str) -> None:
    with pytest.raises(CheckpointError, match="hf download ByteDance-Seed/BAGEL-7B-MoT --local-dir BAGEL-7B-MoT"):
        find_checkpoint(given)


def test_a_file_in_place_of_a_folder_is_recognised(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is a file; give the folder that holds ema\.safetensors"):
        find_checkpoint(folder / "ae.safetensors")
