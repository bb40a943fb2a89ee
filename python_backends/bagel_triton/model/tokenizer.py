"""The checkpoint's tokenizer, and the conversion of prompts to text segments."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

from tokenizers.decoders import DecodeStream

from bagel_triton.model.config import CheckpointError
from bagel_triton.protocol.messages import TextSegment

START, END = "<|im_start|>", "<|im_end|>"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
IMAGE_PAD = "<|image_pad|>"
BYTES = 256


_BODY = rf"(?:(?!{re.escape(START)}|{re.escape(END)}).)*"
_MESSAGE = re.escape(START) + _BODY + re.escape(END)
_WRAPPED = re.compile(rf"{re.escape(START)}({_BODY}){re.escape(END)}", re.DOTALL)
_TEMPLATE = re.compile(rf"(?:{_MESSAGE}\s*)+(?:{re.escape(START)}{_BODY})?", re.DOTALL)


def _byte_symbols() -> dict[str, int]:
    """The byte of each symbol of byte-level BPE, which writes unprintable bytes as characters from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(BYTES) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(BYTES + at): byte for at, byte in enumerate(others)}


_BYTE_OF = _byte_symbols()


def is_template(prompt: str) -> bool:
    """Whether ``prompt`` is a chat template's output, and its markers are tokens.

    That is one or more whole messages, ``<|im_start|>...<|im_end|>``, and perhaps the beginning
    of another one. The same words anywhere else are text.
    """
    return prompt.startswith(START) and _TEMPLATE.fullmatch(prompt) is not None


def unwrapped(prompt: str) -> str:
    """``X`` for a prompt that is exactly ``<|im_start|>X<|im_end|>``; else the prompt itself."""
    found = _WRAPPED.fullmatch(prompt)
    return found[1] if found else prompt


class Tokenizer:
    """Byte-level BPE of the checkpoint in ``directory``.

    Raises:
        CheckpointError: a file cannot be read or was cut off, a special token is missing, has another
            id than the file says or, given ``vocab_size``, no row in the model's embeddings.
    """

    def __init__(self, directory: str | Path, vocab_size: int | None = None) -> None:
        from transformers import Qwen2Tokenizer  # half of a start, which not every stage needs

        try:
            self._tokenizer = Qwen2Tokenizer.from_pretrained(str(directory), local_files_only=True)
        except Exception as error:  # the tokenizers library raises the base class itself
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise CheckpointError(f"the tokenizer in {directory} cannot be loaded: {reason}") from error
        self.backend = self._tokenizer.backend_tokenizer
        self._plain = copy.deepcopy(self.backend)
        self._plain.encode_special_tokens = True
        if not (Path(directory) / "tokenizer.json").exists():  # it would be read instead
            self._check_merges(Path(directory) / "merges.txt")
        self._added_tokens = self.backend.get_added_tokens_decoder().keys()
        self.start, self.end = self._special(START), self._special(END)
        self.vision_start, self.vision_end = self._special(VISION_START), self._special(VISION_END)
        self._check_added_tokens(Path(directory) / "tokenizer_config.json", vocab_size)

    def _check_merges(self, path: Path) -> None:
        """Refuse a file that was cut off after a line: BPE would read it and split text into other tokens.

        Each token is a byte's symbol or the result of one merge.
        """
        merges = sum(not line.startswith(b"#version") for line in path.read_bytes().splitlines())
        tokens = self.backend.get_vocab_size(with_added_tokens=False)
        added = self.backend.get_added_tokens_decoder().values()
        needed = tokens - BYTES - sum(self.backend.model.token_to_id(token.content) is not None for token in added)
        if merges < needed:
            raise CheckpointError(
                f"{path} has {merges} merges; allowed: at least {needed}, as vocab.json has {tokens} tokens"
            )

    def _check_added_tokens(self, path: Path, vocab_size: int | None) -> None:
        """Refuse ids that the model was not trained with: the library renumbers tokens where ids have a gap."""
        said = json.loads(path.read_text("utf-8")).get("added_tokens_decoder", {}) if path.is_file() else {}
        for token_id, token in said.items():
            given = self.backend.token_to_id(token["content"])
            if given != int(token_id):
                raise CheckpointError(f"{path}: {token['content']} has the id {token_id}, and is read as {given}")
        largest = max(self.backend.get_vocab(with_added_tokens=True).values())
        if vocab_size is not None and largest >= vocab_size:
            raise CheckpointError(f"{path.parent}: the tokenizer has ids to {largest}; vocab_size={vocab_size}")

    def _special(self, token: str) -> int:
        ids = self.encode(token)
        if len(ids) != 1:
            raise CheckpointError(f"the tokenizer has no special token {token}")
        return ids[0]

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``, special tokens parsed, nothing added."""
        return self._tokenizer.encode(text, add_special_tokens=False)  # type: ignore[no-any-return]

    def encode_text(self, text: str) -> list[int]:
        """Token ids of ``text``, in which the name of a special token is text too."""
        return self._plain.encode(text, add_special_tokens=False).ids  # type: ignore[no-any-return]

    def segment(self, text: str) -> TextSegment:
        """``text`` as a segment: bare or wrapped text between the two markers, a longer template as it is."""
        inner = unwrapped(text)
        if inner == text and is_template(text):
            return TextSegment(tuple(self.encode(text)))
        return TextSegment((self.start, *self.encode_text(inner), self.end))

    def decode(self, token_ids: list[int]) -> str:
        """Text of ``token_ids``, special tokens included."""
        return self._tokenizer.decode(token_ids, skip_special_tokens=False)  # type: ignore[no-any-return]

    def token_bytes(self, token_id: int) -> bytes:
        """UTF-8 of one token, which may be part of a character; empty for an id without a token."""
        token: str | None = self.backend.id_to_token(token_id)
        if token is None:
            return b""
        if token_id in self._added_tokens:
            return token.encode()
        return bytes(_BYTE_OF[symbol] for symbol in token)

    def stream(self) -> DetokenizerStream:
        """A detokeniser that takes one token at a time."""
        return DetokenizerStream(self)


class DetokenizerStream:
    """Converts tokens to text one by one; bytes of an incomplete character are kept for the next token."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=False)
        self._ids: list[int] = []
        self._length = 0

    def push(self, token_id: int) -> str:
        """The text that ``token_id`` completes; it may be empty."""
        self._ids.append(token_id)
        text = self._stream.step(self._tokenizer.backend, token_id) or ""
        self._length += len(text)
        return text

    def flush(self) -> str:
        """The rest of the text, with replacement characters for incomplete ones."""
        return self._tokenizer.decode(self._ids)[self._length :]
