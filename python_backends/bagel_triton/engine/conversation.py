"""A request's texts and pictures, in the order in which they enter the contexts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bagel_triton.defaults import Modality
from bagel_triton.errors import InvalidRequest
from bagel_triton.messages import Segment, TextSegment
from bagel_triton.model.tokenizer import IMAGE_PAD, START, Tokenizer, unwrapped
from bagel_triton.request import GenerationRequest, PicturePart, TextPart, Turn


@dataclass(frozen=True)
class Conversation:
    """Segments of the ``gen`` context without a think instruction.

    ``before`` is everything before the last text, ``prompt`` that text. ``continues``
    tells that the prompt is a chat template's output, to go on right after its last token.
    """

    before: tuple[Segment, ...]
    prompt: TextSegment
    continues: bool

    def without_pictures(self) -> tuple[Segment, ...]:
        """The text segments alone, in order."""
        return (*(segment for segment in self.before if isinstance(segment, TextSegment)), self.prompt)


def turns_of(request: GenerationRequest, pictures: int) -> tuple[Turn, ...]:
    """The request's turns; a plain prompt is one user turn that holds every picture.

    Raises:
        InvalidRequest: both or neither of prompt and messages, no user turn at the end, or a
            picture that is not there.
    """
    if (request.prompt is None) == (request.messages is None):
        raise InvalidRequest("exactly one of prompt and messages is required", "prompt")
    if request.messages is None:
        assert request.prompt is not None
        shown = [PicturePart(index) for index in range(pictures)]
        return (Turn("user", (TextPart(request.prompt), *shown)),)
    turns = request.messages
    if not turns or turns[-1].role != "user":
        last = turns[-1].role if turns else "no messages"
        raise InvalidRequest.value("messages", last, "a conversation whose last message is the user's")
    used = [part.index for turn in turns for part in turn.parts if isinstance(part, PicturePart)]
    if sorted(used) != list(range(pictures)):
        raise InvalidRequest(f"messages refer to pictures {used}, and image holds {pictures}", "messages")
    return turns


def converse(
    turns: Sequence[Turn],
    pictures: Sequence[Sequence[Segment]],
    tokenizer: Tokenizer,
    wanted: Modality,
    params: Sequence[str],
) -> Conversation:
    """The segments of ``turns``; within a turn pictures come first, whatever their order.

    Args:
        pictures: the segments of each of the request's pictures.
        params: how an error names each turn.

    Raises:
        InvalidRequest: a turn without text or, at the end, without a prompt.
    """
    before: list[Segment] = []
    for turn, param in zip(turns[:-1], params, strict=False):
        before.extend(_pictures(turn, pictures))
        if text := _text(turn):
            before.append(tokenizer.segment(text, param))
        elif not _pictures(turn, pictures):
            raise InvalidRequest.value(param, "", "a text that is not empty")
    last, param = turns[-1], params[-1]
    text = _text(last)
    inner = unwrapped(text)
    if START not in inner:
        before.extend(_pictures(last, pictures))
        return Conversation(tuple(before), tokenizer.segment(text, param), continues=False)
    return _verbatim(inner, before, list(_grouped(last, pictures)), tokenizer, wanted, param)


def _verbatim(
    text: str,
    before: list[Segment],
    groups: list[Sequence[Segment]],
    tokenizer: Tokenizer,
    wanted: Modality,
    param: str,
) -> Conversation:
    """A chat template's output, as it stands; a picture goes where an image pad marks it."""
    pieces = text.split(IMAGE_PAD)
    pads = len(pieces) - 1
    if pads and pads != len(groups):
        raise InvalidRequest(f"{param} marks {pads} pictures with {IMAGE_PAD}, and {len(groups)} are given", param)
    if not pads:
        for group in groups:
            before.extend(group)
    for number, piece in enumerate(pieces[:-1]):
        if ids := tokenizer.encode(piece):
            before.append(TextSegment(tuple(ids)))
        before.extend(groups[number])
    prompt = tokenizer.encode(pieces[-1])
    if not prompt:
        raise InvalidRequest(f"{param} ends with a picture: there is no text to go on from", param)
    return Conversation(tuple(before), TextSegment(tuple(prompt)), continues=wanted == "text")


def _text(turn: Turn) -> str:
    return " ".join(part.text for part in turn.parts if isinstance(part, TextPart))


def _grouped(turn: Turn, pictures: Sequence[Sequence[Segment]]) -> list[Sequence[Segment]]:
    return [pictures[part.index] for part in turn.parts if isinstance(part, PicturePart)]


def _pictures(turn: Turn, pictures: Sequence[Sequence[Segment]]) -> list[Segment]:
    return [segment for group in _grouped(turn, pictures) for segment in group]
