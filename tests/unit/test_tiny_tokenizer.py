"""The tiny checkpoint's tokenizer: it loads as the published one does, and loses no text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from bagel_triton.weights.tiny import checkpoint as tiny_checkpoint
from bagel_triton.weights.tiny.config import SPECIAL_TOKENS, TinyConfig
from bagel_triton.weights.tiny.tokenizer import TEXT

PUBLISHED = Path(__file__).parents[1] / "data" / "tiny-a"


@pytest.fixture(scope="module")
def default(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny") / "default"
    tiny_checkpoint.write(directory, TinyConfig())
    return directory


@pytest.mark.parametrize(
    "text",
    [
        "A cute cat",
        "  two  spaces,\ttabs \n\nand 12345 don't 'quote'\n",
        "naïve café, 山の猫, \N{CAT FACE}",
        "<|im_start|>user\nWhat is it?<|im_end|>\n<|vision_start|><|vision_end|>",
        TEXT,
    ],
)
def test_tokenizer_gives_back_the_text(default: Path, text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(default)
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text


def test_tokenizer_merges_words_of_its_text(default: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(default)
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    assert len(ids) < len(TEXT.encode()) / 2
    assert max(ids) < len(tokenizer) <= TinyConfig().vocab_size


def test_special_tokens_are_single_ids_in_the_published_order(default: Path) -> None:
    made, published = AutoTokenizer.from_pretrained(default), AutoTokenizer.from_pretrained(PUBLISHED)
    ids = [made.encode(token, add_special_tokens=False) for token in SPECIAL_TOKENS]
    assert ids == [[ids[0][0] + offset] for offset in range(len(SPECIAL_TOKENS))]
    by_id = [sorted(tokenizer.get_added_vocab().items(), key=lambda item: item[1]) for tokenizer in (made, published)]
    assert [token for token, _ in by_id[0]] == [token for token, _ in by_id[1]]
    eos = json.loads((default / "llm_config.json").read_text())["eos_token_id"]
    assert eos == made.convert_tokens_to_ids("<|im_end|>")


@pytest.mark.parametrize("vocab_size", [288, 5000])
def test_tokens_fit_the_embedding_whatever_its_size(tmp_path: Path, vocab_size: int) -> None:
    tiny_checkpoint.write(tmp_path / "c", TinyConfig(vocab_size=vocab_size))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "c")
    assert tokenizer.decode(tokenizer.encode("A cute cat", add_special_tokens=False)) == "A cute cat"
    assert max(tokenizer.get_vocab().values()) < vocab_size
