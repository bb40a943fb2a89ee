"""Prompts as segments: bare, wrapped, verbatim, or refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from bagel_triton.model.config import CheckpointError
from bagel_triton.model.tokenizer import Tokenizer
from tests.support.cases import Case


@pytest.fixture(scope="module")
def tokenizer(checkpoint_dir: Path) -> Tokenizer:
    return Tokenizer(checkpoint_dir)


def test_prompts_become_the_recorded_ids(tokenizer: Tokenizer, cases: tuple[Case, ...]) -> None:
    for case in cases:
        assert tokenizer.segment(case.prompt).token_ids == case.prompt_ids


@pytest.mark.parametrize("prompt", ["A cute cat", " two  spaces\n", "naïve café, 山"])
def test_a_bare_prompt_gets_the_two_markers_and_nothing_else(tokenizer: Tokenizer, prompt: str) -> None:
    start, *inner, end = tokenizer.segment(prompt).token_ids
    assert (start, end) == (tokenizer.start, tokenizer.end)
    assert inner == tokenizer.encode(prompt)


@pytest.mark.parametrize("prompt", ["A cute cat", " two  spaces\n", "naïve café, 山"])
def test_a_wrapped_prompt_means_what_it_wraps(tokenizer: Tokenizer, prompt: str) -> None:
    wrapped = tokenizer.segment(f"<|im_start|>{prompt}<|im_end|>")
    assert wrapped == tokenizer.segment(prompt)


@pytest.mark.parametrize(
    "prompt",
    [
        "<|im_start|>user\nA cat<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>system\nBe brief.<|im_end|><|im_start|>A cat<|im_end|>",
        "<|im_start|>A cat<|im_end|><|im_start|>",
    ],
)
def test_a_prompt_in_chat_form_stands_as_it_is(tokenizer: Tokenizer, prompt: str) -> None:
    token_ids = list(tokenizer.segment(prompt).token_ids)
    assert token_ids == tokenizer.encode(prompt)
    assert token_ids.count(tokenizer.start) == prompt.count("<|im_start|>")
    assert token_ids.count(tokenizer.end) == prompt.count("<|im_end|>")


@pytest.mark.parametrize(
    "prompt",
    [
        "<|im_start|>A cat",
        "A cat<|im_start|>",
        "<|im_start|>A<|im_end|> cat<|im_end|>",
        "ends with <|im_end|> inside",
        "a <|image_pad|> and <|vision_start|>",
        "<|im_end|>",
    ],
)
def test_a_special_tokens_name_in_prose_is_text(tokenizer: Tokenizer, prompt: str) -> None:
    start, *inner, end = tokenizer.segment(prompt).token_ids
    assert (start, end) == (tokenizer.start, tokenizer.end)
    assert tokenizer.decode(inner) == prompt
    special = {tokenizer.start, tokenizer.end, tokenizer.vision_start, tokenizer.vision_end}
    assert not special.intersection(inner)


def test_a_special_token_with_another_id_than_the_file_says_is_named(checkpoint_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint_dir, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors"))
    file = tmp_path / "tokenizer_config.json"
    fields = json.loads(file.read_text())
    added = fields["added_tokens_decoder"]
    fields["added_tokens_decoder"] = {str(int(token_id) + 7): token for token_id, token in added.items()}
    file.write_text(json.dumps(fields))
    with pytest.raises(
        CheckpointError, match=r"tokenizer_config\.json: <\|endoftext\|> has the id 487, and is read as 480"
    ):
        Tokenizer(tmp_path)


def test_embeddings_with_fewer_rows_than_there_are_tokens_are_named(checkpoint_dir: Path) -> None:
    largest = max(Tokenizer(checkpoint_dir).backend.get_vocab(with_added_tokens=True).values())
    Tokenizer(checkpoint_dir, largest + 1)
    with pytest.raises(CheckpointError, match=f"the tokenizer has ids to {largest}; vocab_size={largest}"):
        Tokenizer(checkpoint_dir, largest)


def test_the_image_markers_are_two_single_tokens(tokenizer: Tokenizer, checkpoint_dir: Path) -> None:
    special = json.loads((checkpoint_dir.parent / "cases-a" / "cases.json").read_text())["special_ids"]
    assert (tokenizer.start, tokenizer.end) == (special["bos_token_id"], special["eos_token_id"])
    assert (tokenizer.vision_start, tokenizer.vision_end) == (special["start_of_image"], special["end_of_image"])


def test_a_tokenizer_without_the_markers_is_a_broken_checkpoint(checkpoint_dir: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(checkpoint_dir, tmp_path / "broken"))
    config = json.loads((broken / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"] = {
        token_id: token
        for token_id, token in config["added_tokens_decoder"].items()
        if token["content"] != "<|vision_start|>"
    }
    config.pop("additional_special_tokens", None)
    config.pop("extra_special_tokens", None)
    (broken / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"no special token <\|vision_start\|>"):
        Tokenizer(broken)


@pytest.mark.parametrize("contents", ["", "not json", "[]"])
def test_a_garbage_vocabulary_is_a_broken_checkpoint(checkpoint_dir: Path, tmp_path: Path, contents: str) -> None:
    broken = Path(shutil.copytree(checkpoint_dir, tmp_path / "broken"))
    (broken / "vocab.json").write_text(contents)
    with pytest.raises(CheckpointError, match=r"the tokenizer in .*broken cannot be loaded"):
        Tokenizer(broken)


@pytest.mark.parametrize("left", [0, 100, 223])
def test_merges_that_were_cut_at_the_end_of_a_line_are_a_broken_checkpoint(
    checkpoint_dir: Path, tmp_path: Path, left: int
) -> None:
    broken = _cut(checkpoint_dir, tmp_path / "broken", left)
    cause = rf"broken/merges.txt has {left} merges; allowed: at least 224, as vocab.json has 480 tokens"
    with pytest.raises(CheckpointError, match=cause):
        Tokenizer(broken)


def test_merges_are_not_needed_beside_a_tokenizer_json(
    tokenizer: Tokenizer, checkpoint_dir: Path, tmp_path: Path
) -> None:
    whole = _cut(checkpoint_dir, tmp_path / "whole", 100)
    tokenizer.backend.save(str(whole / "tokenizer.json"))
    assert Tokenizer(whole).encode("A cute cat") == tokenizer.encode("A cute cat")


def test_special_tokens_that_the_vocabulary_has_too_need_no_merges(
    tokenizer: Tokenizer, checkpoint_dir: Path, tmp_path: Path
) -> None:
    whole = Path(shutil.copytree(checkpoint_dir, tmp_path / "whole"))
    vocabulary = json.loads((whole / "vocab.json").read_text())
    added = {token.content: token_id for token_id, token in tokenizer.backend.get_added_tokens_decoder().items()}
    (whole / "vocab.json").write_text(json.dumps(vocabulary | added))
    assert Tokenizer(whole).encode("A cute cat") == tokenizer.encode("A cute cat")


def _cut(checkpoint: Path, copy: Path, left: int) -> Path:
    """A ``copy`` of a checkpoint that has ``left`` of its merges."""
    shutil.copytree(checkpoint, copy)
    head, *merges = (copy / "merges.txt").read_text().splitlines(keepends=True)
    (copy / "merges.txt").write_text("".join([head, *merges[:left]]))
    return copy
