"""A request's texts and images, in the order in which they enter the contexts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bagel_triton.model.tokenizer import IMAGE_PAD, START, Tokenizer, unwrapped
from bagel_triton.protocol.errors import InvalidRequest, format_value
from bagel_triton.protocol.messages import Segment, TextSegment
from bagel_triton.protocol.request import GenerationRequest, ImageRef, Modality, TextPart, Turn


@dataclass(frozen=True)
class Conversation:
    """Segments of the ``gen`` context without a think instruction.

    ``before`` is everything before the last text, ``prompt`` that text. ``continues``
    tells that the prompt is a chat template's output, to go on right after its last token.
    """

    before: tuple[Segment, ...]
    prompt: TextSegment
    continues: bool

    def without_images(self) -> tuple[Segment, ...]:
        """The text segments alone, in order."""
        return (*(segment for segment in self.before if isinstance(segment, TextSegment)), self.prompt)


def turns_of(request: GenerationRequest, images: int) -> tuple[Turn, ...]:
    """The request's turns; a plain prompt is one user turn that holds every image.

    Raises:
        InvalidRequest: both or neither of prompt and messages, no user turn at the end, or a
            image that is not there.
    """
    if (request.prompt is None) == (request.messages is None):
        raise InvalidRequest("exactly one of prompt and messages is required", "prompt")
    if request.messages is None:
        assert request.prompt is not None
        parts = [ImageRef(index) for index in range(images)]
        return (Turn("user", (TextPart(request.prompt), *parts)),)
    turns = request.messages
    if not turns or turns[-1].role != "user":
        last = turns[-1].role if turns else "no messages"
        raise InvalidRequest.value("messages", last, "a conversation whose last message is the user's")
    used = [part.index for turn in turns for part in turn.parts if isinstance(part, ImageRef)]
    if sorted(used) != list(range(images)):
        raise InvalidRequest(
            f"messages refer to images {format_value(used)}, and image holds {images}; allowed: each of them once",
            "messages",
        )
    return turns


def converse(
    turns: Sequence[Turn],
    images: Sequence[Sequence[Segment]],
    tokenizer: Tokenizer,
    wanted: Modality,
    params: Sequence[str],
) -> Conversation:
    """The segments of ``turns``.

    Args:
        images: the segments of each of the request's images.
        params: how an error names each turn.

    Raises:
        InvalidRequest: a turn with nothing in it, with marks for other than its images or, at
            the end, without a prompt.
    """
    *before, prompt = (
        segment
        for number, (turn, param) in enumerate(zip(turns, params, strict=True), 1)
        for segment in _laid_out(turn, images, tokenizer, wanted, param, is_last=number == len(turns))
    )
    assert isinstance(prompt, TextSegment), "the last turn ends with a text"
    continues = wanted == "text" and START in _text(turns[-1])
    return Conversation(tuple(before), prompt, continues)


def _laid_out(
    turn: Turn,
    images: Sequence[Sequence[Segment]],
    tokenizer: Tokenizer,
    wanted: Modality,
    param: str,
    is_last: bool,
) -> list[Segment]:
    """The images of ``turn``, then its text; or each image where an image pad in the text marks it.

    A text with markers of its own stands as it is; where an image is wanted, one that is only
    wrapped in them means what they wrap. Of any other text, what is between the images are
    segments of their own.
    """
    text = _text(turn)
    groups = [images[part.index] for part in turn.parts if isinstance(part, ImageRef)]
    inner = unwrapped(text) if wanted == "image" else text
    verbatim = START in inner
    pieces = inner.split(IMAGE_PAD)
    marks = len(pieces) - 1
    if not marks:
        if not unwrapped(text).strip() and (is_last or text or not groups):
            beside = " beside the images" if groups else ""
            raise InvalidRequest.value(param, text, f"a text that is not empty{beside}")
        pieces = [*[""] * len(groups), inner]
    elif marks != len(groups):
        raise InvalidRequest(
            f"{param}={format_value(text)} marks {marks} images with {IMAGE_PAD}, and {len(groups)} are given; "
            "allowed: a mark for each image of the message, or none",
            param,
        )
    elif not verbatim:
        pieces = [piece.strip() for piece in pieces]
    if is_last and not pieces[-1]:
        raise InvalidRequest.value(param, text, f"a text that goes on after the last {IMAGE_PAD}")
    segments: list[Segment] = []
    for piece, group in zip(pieces, [*groups, ()], strict=True):
        if piece:
            segments.append(TextSegment(tuple(tokenizer.encode(piece))) if verbatim else tokenizer.segment(piece))
        segments.extend(group)
    return segments


def _text(turn: Turn) -> str:
    return " ".join(part.text for part in turn.parts if isinstance(part, TextPart))
