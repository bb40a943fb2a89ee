"""A request's texts and images as segments, in the order in which they enter the contexts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bagel_triton.model.tokenizer import IMAGE_PAD, Tokenizer, is_template, unwrapped
from bagel_triton.protocol.errors import InvalidRequest, format_value
from bagel_triton.protocol.messages import Segment, TextSegment
from bagel_triton.protocol.request import GenerationRequest, ImageRef, Modality, TextPart, Turn


@dataclass(frozen=True)
class Conversation:
    """Segments of the ``gen`` context without a think instruction.

    ``prompt`` is the index of the first segment that guidance by the prompt leaves out: the
    last text of the user. ``continues`` tells that decoding goes on right after the last
    token, which is that of a chat template's output or of an assistant's message.
    """

    segments: tuple[Segment, ...]
    prompt: int
    continues: bool

    def without_prompt(self) -> tuple[Segment, ...]:
        """The segments before the prompt, and the images after it."""
        images = (segment for segment in self.segments[self.prompt :] if not isinstance(segment, TextSegment))
        return (*self.segments[: self.prompt], *images)

    def without_images(self) -> tuple[Segment, ...]:
        """The text segments alone, in order."""
        return tuple(segment for segment in self.segments if isinstance(segment, TextSegment))


def turns_of(request: GenerationRequest, images: int) -> tuple[Turn, ...]:
    """The request's turns; a plain prompt is one user turn that holds every image.

    Raises:
        InvalidRequest: both or neither of prompt and messages, no turn, or an image index that
            does not exist.
    """
    if (request.prompt is None) == (request.messages is None):
        raise InvalidRequest("exactly one of prompt and messages is required", "prompt")
    if request.messages is None:
        assert request.prompt is not None
        parts = [ImageRef(index) for index in range(images)]
        return (Turn("user", (TextPart(request.prompt), *parts)),)
    turns = request.messages
    if not turns:
        raise InvalidRequest.value("messages", [], "at least one message")
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
    """The segments of ``turns``. A turn with neither words nor images adds nothing.

    For text output, the last question of the user may be empty, and so may be a whole conversation.

    Args:
        images: the segments of each of the request's images.
        params: the name of each turn in an error.

    Raises:
        InvalidRequest: a template that marks other images than its turn has, or no words to draw.
    """
    segments: list[Segment] = []
    prompt = -1
    for number, (turn, param) in enumerate(zip(turns, params, strict=True), 1):
        is_last = number == len(turns)
        laid_out = _laid_out(turn, images, tokenizer, wanted, param, is_last)
        texts = [index for index, segment in enumerate(laid_out, len(segments)) if isinstance(segment, TextSegment)]
        segments += laid_out
        if texts and (turn.role == "user" or prompt < 0):
            prompt = texts[-1]
    if prompt < 0 and wanted == "image":
        beside = " beside the images" if segments else ""
        raise InvalidRequest.value(params[-1], _text(turns[-1]), f"a text that is not empty{beside}")
    if wanted == "text" and (not segments or (turns[-1].role == "user" and not laid_out)):
        return Conversation((*segments, TextSegment((tokenizer.start, tokenizer.end))), len(segments), continues=False)
    last = _last_spoken(turns)
    open_ended = wanted == "text" and (last.role == "assistant" or is_template(_text(last)))
    continues = open_ended and isinstance(segments[-1], TextSegment)
    return Conversation(tuple(segments), prompt if prompt >= 0 else len(segments), continues)


def _laid_out(
    turn: Turn,
    images: Sequence[Sequence[Segment]],
    tokenizer: Tokenizer,
    wanted: Modality,
    param: str,
    is_last: bool,
) -> list[Segment]:
    """The images of ``turn``, then its text; in a template each image where a pad marks it.

    A template is tokenised as it stands. For image output, one that only wraps a text means
    that text.
    """
    text = _text(turn)
    groups = [images[part.index] for part in turn.parts if isinstance(part, ImageRef)]
    inner = unwrapped(text)
    if not inner.strip():
        return [segment for group in groups for segment in group]
    if not is_template(text):
        open_ended = is_last and wanted == "text" and turn.role == "assistant"
        return [*(segment for group in groups for segment in group), _segment(tokenizer, text, open_ended)]
    return _templated(text, inner, groups, tokenizer, wanted, param, is_last)


def _templated(
    text: str,
    inner: str,
    groups: Sequence[Sequence[Segment]],
    tokenizer: Tokenizer,
    wanted: Modality,
    param: str,
    is_last: bool,
) -> list[Segment]:
    verbatim = wanted == "text" or inner == text
    pieces = (text if verbatim else inner).split(IMAGE_PAD)
    pads = len(pieces) - 1
    if not pads:
        pieces = [*[""] * len(groups), pieces[0]]
    elif pads != len(groups):
        raise InvalidRequest(
            f"{param}={format_value(text)} marks {pads} images with {IMAGE_PAD}, and {len(groups)} are given; "
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
            segments.append(TextSegment(tuple(tokenizer.encode(piece))) if verbatim else _segment(tokenizer, piece))
        segments.extend(group)
    return segments


def _segment(tokenizer: Tokenizer, text: str, open_ended: bool = False) -> TextSegment:
    """``text`` between the two markers; without the second one if it is to be continued."""
    end = () if open_ended else (tokenizer.end,)
    return TextSegment((tokenizer.start, *tokenizer.encode_text(text), *end))


def _last_spoken(turns: Sequence[Turn]) -> Turn:
    """The last turn that adds something."""
    spoken = (turn for turn in reversed(turns) if unwrapped(_text(turn)).strip() or any_image(turn))
    return next(spoken, turns[-1])


def any_image(turn: Turn) -> bool:
    """Whether ``turn`` shows an image."""
    return any(isinstance(part, ImageRef) for part in turn.parts)


def _text(turn: Turn) -> str:
    return " ".join(part.text for part in turn.parts if isinstance(part, TextPart))
