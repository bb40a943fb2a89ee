"""The checkpoint's tokenizer and how a prompt becomes a text segment."""

from __future__ import annotations

from pathlib import Path

from transformers import Qwen2Tokenizer

from bagel_triton.errors import InvalidRequest
from bagel_triton.messages import TextSegment
from bagel_triton.model.config import CheckpointError

START, END = "<|im_start|>", "<|im_end|>"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"


def unwrapped(prompt: str) -> str:
    """``X`` for a prompt that is exactly ``<|im_start|>X<|im_end|>``; else the prompt itself."""
    inner = prompt.removeprefix(START).removesuffix(END)
    if prompt == f"{START}{inner}{END}" and START not in inner and END not in inner:
        return inner
    return prompt


class Tokenizer:
    """Byte-level BPE of the checkpoint in ``directory``.

    Raises:
        CheckpointError: a file cannot be read, or a special token is missing.
    """

    def __init__(self, directory: str | Path) -> None:
        try:
            self._tokenizer = Qwen2Tokenizer.from_pretrained(str(directory), local_files_only=True)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"the tokenizer in {directory} cannot be loaded: {error}") from error
        self.start, self.end = self._special(START), self._special(END)
        self.vision_start, self.vision_end = self._special(VISION_START), self._special(VISION_END)

    def _special(self, token: str) -> int:
        ids = self.encode(token)
        if len(ids) != 1:
            raise CheckpointError(f"the tokenizer has no special token {token}")
        return ids[0]

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``, special tokens parsed, nothing added."""
        return self._tokenizer.encode(text, add_special_tokens=False)  # type: ignore[no-any-return]

    def segment(self, text: str, param: str) -> TextSegment:
        """A prompt for a picture as a segment: bare or wrapped text between the two markers;
        text that holds ``<|im_start|>`` in any other way stands as it is.

        Raises:
            InvalidRequest: there is no text; ``param`` names the field.
        """
        inner = unwrapped(text)
        if not inner.strip():
            raise InvalidRequest.value(param, text, "a text that is not empty")
        if START in inner:
            return TextSegment(tuple(self.encode(inner)))
        return TextSegment((self.start, *self.encode(inner), self.end))
