"""The planning stage: a request's texts and images become segments in order, and these the segments of each branch."""

from __future__ import annotations

import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from bagel_triton.deploy.config import DeployConfig
from bagel_triton.deploy.topology import ORCHESTRATOR
from bagel_triton.engine.preprocess.image_input import image_segments
from bagel_triton.ipc.adapters import AdapterTable
from bagel_triton.model.config import ModelConfig, segment_tokens
from bagel_triton.model.tokenizer import IMAGE_PAD, Tokenizer, is_template, unwrapped
from bagel_triton.protocol.errors import InvalidRequest, format_value
from bagel_triton.protocol.messages import Branch, BranchPlan, Decoding, Plan, Segment, TextSegment, Usage
from bagel_triton.protocol.request import (
    FIELD_TYPES,
    IMG2IMG,
    TEXT2IMG,
    GenerationRequest,
    ImageRef,
    Modality,
    TextPart,
    Turn,
)
from bagel_triton.protocol.validation import (
    check_adapter,
    check_text_size,
    resolve_decoding,
    resolve_flow,
    resolve_modality,
    resolve_scheduling,
    resolve_seed,
)
from bagel_triton.weights.files import CheckpointFiles


@dataclass(frozen=True)
class Conversation:
    """Segments of the ``gen`` context without a think instruction.

    ``prompt`` is the index of the first segment that guidance by the prompt leaves out: the
    last text of the user. ``continues`` means that decoding goes on right after the last
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
    open_ended = wanted == "text" and not turns[-1].ended and (_is_open(last) or is_template(_text(last)))
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
        open_ended = is_last and wanted == "text" and _is_open(turn)
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


def _is_open(turn: Turn) -> bool:
    """Whether a text that follows ``turn`` continues it."""
    return turn.role == "assistant" and not turn.ended


def any_image(turn: Turn) -> bool:
    """Whether ``turn`` shows an image."""
    return any(isinstance(part, ImageRef) for part in turn.parts)


def _text(turn: Turn) -> str:
    return " ".join(part.text for part in turn.parts if isinstance(part, TextPart))


# The model was trained with these two texts, the space before each newline included.
THINK_BEFORE_IMAGE = (
    "You should first think about the planning process in the mind and then generate the image. \n"
    "The planning process is enclosed within <think> </think> tags, i.e. "
    "<think> planning process here </think> image here"
)
THINK_BEFORE_ANSWER = (
    "You should first think about the reasoning process in the mind and then provide the user with the answer. \n"
    "The reasoning process is enclosed within <think> </think> tags, i.e. "
    "<think> reasoning process here </think> answer here"
)


class RequestPlanner:
    """Validates requests against one checkpoint and plans their branches. Thread-safe.

    ``think_by_default`` is what a request means that does not say whether to think;
    ``timeout_s`` is the time of one that names none. ``defaults`` are values of other fields,
    by the kind of output, for requests that leave them out. Without ``draws_images`` requests for one are refused.
    ``adapters`` are the names that ``lora`` may have.
    """

    def __init__(
        self,
        config: ModelConfig,
        tokenizer: Tokenizer,
        think_by_default: bool = False,
        timeout_s: float = 3600.0,
        defaults: Mapping[Modality, Mapping[str, Any]] | None = None,
        draws_images: bool = True,
        adapters: Collection[str] = (),
    ) -> None:
        self._config, self._tokenizer, self._draws_images = config, tokenizer, draws_images
        self._adapters = adapters
        self._think, self._timeout_s = think_by_default, timeout_s
        self._defaults = {
            kind: {name: msgspec.convert(value, FIELD_TYPES[name], str_keys=True) for name, value in values.items()}
            for kind, values in (defaults or {}).items()
        }

    @classmethod
    def open(cls, config: DeployConfig) -> RequestPlanner:
        """The planner of ``config``'s checkpoint.

        Raises:
            CheckpointError: the checkpoint is wrong.
        """
        model = CheckpointFiles(config.checkpoint, config.max_generated_image_size).config
        tokenizer = Tokenizer(config.checkpoint, model.language.vocab_size)
        think, timeout_s = config.topology.think_by_default, config.bagel.request_timeout_s
        draws = config.load != "understanding"
        adapters = AdapterTable(config.shm_prefix, ORCHESTRATOR, config.lora_modules)
        return cls(model, tokenizer, think, timeout_s, config.request_defaults, draws, adapters)

    def expand(self, request: GenerationRequest, client_id: str = "") -> Plan:
        """The plan of a request.

        ``client_id`` is the caller's name for it; the plan's own id is always unique.

        Raises:
            InvalidRequest: names the field, its value and what is allowed.
        """
        wanted = resolve_modality(request)
        if wanted == "image" and not self._draws_images:
            allowed = "text; images are made by a server that is started with load=all, and this one has understanding"
            raise InvalidRequest.value("modality", "image", allowed)
        defaults = self._defaults.get(wanted, {})
        left_out = {name: value for name, value in defaults.items() if getattr(request, name) is None}
        if request.aspect_ratio is not None:  # the default size gives it its area
            left_out = {name: value for name, value in left_out.items() if name not in ("height", "width")}
        request = msgspec.structs.replace(request, **left_out)
        think = self._think if request.think is None else request.think
        request = msgspec.structs.replace(request, think=think, seed=resolve_seed(request))
        check_text_size(request)
        check_adapter(request.lora, self._adapters)
        config = self._config
        images, size = image_segments(
            request.image or (), wanted, config.latent.max_side, config.vae_resize, config.vit_resize
        )
        turns = turns_of(request, len(images))
        plain = request.prompt is not None
        names = ["prompt"] if plain else [f"messages[{index}].content" for index in range(len(turns))]
        conversation = converse(turns, images, self._tokenizer, wanted, names)
        make = self._image if wanted == "image" else self._text
        plan = make(request, conversation, size, f"{client_id or 'request'}-{secrets.token_hex(6)}")
        scheduling = resolve_scheduling(request, self._timeout_s)
        return msgspec.structs.replace(plan, scheduling=scheduling, lora=request.lora or "")

    def _opening(self, instruction: str, think: bool | None) -> tuple[Segment, ...]:
        return (self._tokenizer.segment(instruction),) if think else ()

    def _image(
        self, request: GenerationRequest, conversation: Conversation, size: tuple[int, int] | None, request_id: str
    ) -> Plan:
        has_images = size is not None
        flow_defaults = IMG2IMG if has_images else TEXT2IMG
        usual = min(flow_defaults.side, self._config.drawn_side)
        defaults = self._defaults.get("image", {})
        height = defaults.get("height", defaults.get("width"))
        if request.aspect_ratio is not None and height is not None:
            size = (height, defaults.get("width", height))
        flow = resolve_flow(request, self._config.latent.max_side, flow_defaults, size or (usual, usual))
        opening = self._opening(THINK_BEFORE_IMAGE, request.think)
        gen = (*opening, *conversation.segments)
        negative = (self._negative(request.negative_prompt),) if request.negative_prompt else ()
        text_free = (*opening, *conversation.without_prompt(), *negative)
        branches = [BranchPlan(Branch.GEN, gen), BranchPlan(Branch.CFG_TEXT, text_free)]
        if has_images or request.think:
            branches.append(BranchPlan(Branch.CFG_IMG, (*opening, *conversation.without_images())))
        else:  # without an image or a thought the image-free context is the full one
            branches.append(BranchPlan(Branch.CFG_IMG, same_as=Branch.GEN))
        latents = (flow.height // self._config.latent.stride) * (flow.width // self._config.latent.stride)
        return Plan(
            request_id=request_id,
            branches=tuple(branches),
            usage=msgspec.structs.replace(self._usage((*gen, *negative)), image_tokens=latents * flow.num_images),
            flow=flow,
            decoding=self._decoding(request, "image") if request.think else None,
        )

    def _text(
        self, request: GenerationRequest, conversation: Conversation, size: tuple[int, int] | None, request_id: str
    ) -> Plan:
        opening = self._opening(THINK_BEFORE_ANSWER, request.think)
        segments: tuple[Segment, ...] = (*opening, *conversation.segments)
        decoding = self._decoding(request, "text")
        usage = self._usage(segments)
        if conversation.continues:
            segments, decoding = _continued(segments, decoding)
        branches = (BranchPlan(Branch.GEN, segments),)
        return Plan(request_id=request_id, branches=branches, usage=usage, decoding=decoding)

    def _negative(self, text: str) -> TextSegment:
        if is_template(text) and IMAGE_PAD in text:
            raise InvalidRequest.value("negative_prompt", text, f"a template without {IMAGE_PAD}")
        return self._tokenizer.segment(text)

    def _decoding(self, request: GenerationRequest, wanted: Modality) -> Decoding:
        return resolve_decoding(request, self._tokenizer.start, wanted, self._config.language.vocab_size)

    def _usage(self, segments: Sequence[Segment]) -> Usage:
        """The tokens of a prompt."""
        images = [segment for segment in segments if not isinstance(segment, TextSegment)]
        return Usage(prompt_tokens=self._count(segments), prompt_image_tokens=self._count(images))

    def _count(self, segments: Sequence[Segment]) -> int:
        return sum(segment_tokens(segment, self._config) for segment in segments)


def _continued(segments: tuple[Segment, ...], decoding: Decoding) -> tuple[tuple[Segment, ...], Decoding]:
    """Decoding that goes on from the last token of the context, which is fed as the first."""
    text = segments[-1]
    assert isinstance(text, TextSegment)
    *rest, last = text.token_ids
    tail = (TextSegment(tuple(rest)),) if rest else ()
    return (*segments[:-1], *tail), msgspec.structs.replace(decoding, first_token=last)
