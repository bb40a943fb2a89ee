"""The planning stage: a request becomes the segments of each branch."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from bagel_triton.deploy.config import DeployConfig
from bagel_triton.engine.preprocess.conversation import Conversation, converse, turns_of
from bagel_triton.engine.preprocess.image_input import image_segments
from bagel_triton.engine.token_count import segment_tokens
from bagel_triton.model.config import ModelConfig
from bagel_triton.model.tokenizer import IMAGE_PAD, Tokenizer, is_template
from bagel_triton.protocol.errors import InvalidRequest
from bagel_triton.protocol.messages import Branch, BranchPlan, Decoding, Plan, Segment, TextSegment, Usage
from bagel_triton.protocol.request import FIELD_TYPES, IMG2IMG, TEXT2IMG, GenerationRequest, Modality
from bagel_triton.protocol.validation import (
    check_text_size,
    resolve_decoding,
    resolve_flow,
    resolve_modality,
    resolve_scheduling,
    resolve_seed,
)
from bagel_triton.weights.files import CheckpointFiles

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
    by the kind of output, for requests that leave them out.
    """

    def __init__(
        self,
        config: ModelConfig,
        tokenizer: Tokenizer,
        think_by_default: bool = False,
        timeout_s: float = 3600.0,
        defaults: Mapping[Modality, Mapping[str, Any]] | None = None,
    ) -> None:
        self._config, self._tokenizer = config, tokenizer
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
        model = CheckpointFiles(config.checkpoint).config
        tokenizer = Tokenizer(config.checkpoint, model.language.vocab_size)
        think, timeout_s = config.topology.think_by_default, config.bagel.request_timeout_s
        return cls(model, tokenizer, think, timeout_s, config.request_defaults)

    def expand(self, request: GenerationRequest, client_id: str = "") -> Plan:
        """The plan of a request.

        ``client_id`` is the caller's name for it; the plan's is unique whatever it is.

        Raises:
            InvalidRequest: names the field, its value and what is allowed.
        """
        wanted = resolve_modality(request)
        defaults = self._defaults.get(wanted, {})
        request = msgspec.structs.replace(
            request, **{name: value for name, value in defaults.items() if getattr(request, name) is None}
        )
        think = self._think if request.think is None else request.think
        request = msgspec.structs.replace(request, think=think, seed=resolve_seed(request))
        check_text_size(request)
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
        return msgspec.structs.replace(plan, scheduling=resolve_scheduling(request, self._timeout_s))

    def _opening(self, instruction: str, think: bool | None) -> tuple[Segment, ...]:
        return (self._tokenizer.segment(instruction),) if think else ()

    def _image(
        self, request: GenerationRequest, conversation: Conversation, size: tuple[int, int] | None, request_id: str
    ) -> Plan:
        has_images = size is not None
        flow_defaults = IMG2IMG if has_images else TEXT2IMG
        flow = resolve_flow(request, self._config.latent.max_side, flow_defaults, size)
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
