"""A small byte-level BPE tokenizer in the file format of Qwen2's."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from bagel_triton.weights.tiny.config import ADDED_TOKENS, SPARE_ROWS, SPECIAL_TOKENS

TEXT = """\
You should first think about the planning process in the mind and then generate the image. \n\
The planning process is enclosed within <think> </think> tags, i.e. <think> planning process here </think> image here
You should first think about the reasoning process in the mind and then provide the user with the answer. \n\
The reasoning process is enclosed within <think> </think> tags, i.e. <think> reasoning process here </think> answer here
system
user
assistant
You are a helpful assistant that paints images.
A cute cat sleeps on a red cushion beside the window, and the morning sun warms its fur.
A beautiful sunset over the mountains, with orange clouds above a quiet lake.
A futuristic city at night, its towers and bridges lit by blue and pink lights in the rain.
An old lighthouse on a small rocky island, waves and gulls all around, in the style of an oil painting.
A photograph of a brown dog that runs along the beach with a yellow ball.
Three green apples in a white bowl on a wooden table, soft light from the left.
A portrait of a woman with a large straw hat, watercolor on paper, highly detailed.
Draw a simple house with a blue door, a garden full of flowers, and a tree on the right.
Make the sky darker and add stars, but keep the river and the boat as they are.
Remove the people in the background, then turn the image into a pencil drawing.
What is in this image? Describe its colors, its shapes and the objects that stand in front.
How many birds are there in the image? There are five birds, two of them on the roof.
What is the capital of France? The capital of France is Paris.
Low quality, blurry, dark, noisy, cut off, watermark, bad hands.
A bear and a fox drink tea in the forest while snow falls between the trees.
The train crosses a stone bridge over the valley, and white steam drifts behind it.
"""


def write(
    directory: Path, vocab_size: int, texts: Iterable[str] = tuple(TEXT.splitlines(keepends=True))
) -> dict[str, int]:
    """Train the tokenizer and write its files into ``directory``.

    Args:
        vocab_size: rows of the model's embedding; some of them stay without a token.
        texts: the training texts.

    Returns:
        Ids of the special tokens.
    """
    added = SPECIAL_TOKENS + ADDED_TOKENS
    tokenizer = Tokenizer(models.BPE())
    # Qwen2 cuts text a little differently (single digits); a merge learned here that it never meets does no harm.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(added) - SPARE_ROWS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.model.save(str(directory))
    # The short text may run out of pairs to merge, so the first free id is the trained size, not the requested one.
    first = tokenizer.get_vocab_size()
    ids = {token: first + offset for offset, token in enumerate(added)}
    (directory / "tokenizer_config.json").write_text(json.dumps(_settings(ids), indent=2) + "\n")
    return ids


def _settings(ids: dict[str, int]) -> dict[str, object]:
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    return {
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(index): {"content": token, **flags, "special": token in SPECIAL_TOKENS} for token, index in ids.items()
        },
        "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|endoftext|>",
        "errors": "replace",
        "model_max_length": 131072,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
