"""The chat completion: the reply to a request that succeeded."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterable, Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from bagel_triton.openai.image_io import data_url
from bagel_triton.protocol import events as protocol_events
from bagel_triton.protocol.errors import Internal
from bagel_triton.protocol.events import AnswerEvent, DoneEvent, ImageEvent, Stage
from bagel_triton.protocol.messages import Usage as StageUsage
from bagel_triton.protocol.request import Modality
from bagel_triton.triton.client import StageResponse

IMAGE_FINISH = "stop"  # an image is never cut short


class ImageUrl(msgspec.Struct, frozen=True):
    """An image as a ``data:`` URL."""

    url: str


class ImagePart(msgspec.Struct, frozen=True):
    """An image of a message, its number there, and the seed it was made with."""

    image_url: ImageUrl
    index: int
    seed: int
    type: Literal["image_url"] = "image_url"


class TokenLogprob(msgspec.Struct, frozen=True):
    """A token, its UTF-8 bytes and its log-probability."""

    token: str
    logprob: float
    bytes: tuple[int, ...]


class ContentLogprob(TokenLogprob, frozen=True):
    """A token of the answer, and the most probable ones at its place."""

    top_logprobs: tuple[TokenLogprob, ...] = ()


class Logprobs(msgspec.Struct, frozen=True):
    """The log-probabilities of an answer, token by token."""

    content: tuple[ContentLogprob, ...]
    refusal: None = None


class AssistantMessage(msgspec.Struct, frozen=True):
    """The model's answer, and the thinking before it if there was some.

    Images are in ``content``, in ``images``, or in both, as :class:`ReplyOptions` say.
    """

    content: str | tuple[ImagePart, ...]
    reasoning_content: str | msgspec.UnsetType = msgspec.UNSET
    images: tuple[ImagePart, ...] | msgspec.UnsetType = msgspec.UNSET
    role: Literal["assistant"] = "assistant"


class Choice(msgspec.Struct, frozen=True):
    """One of a completion's answers."""

    message: AssistantMessage
    finish_reason: str
    index: int = 0
    logprobs: Logprobs | None = None


class CompletionTokensDetails(msgspec.Struct, frozen=True):
    """The completion's tokens by kind: latent tokens of images, and text, some of it thinking."""

    image_tokens: int
    text_tokens: int
    reasoning_tokens: int


class Usage(msgspec.Struct, frozen=True):
    """True token counts, in OpenAI's names."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    completion_tokens_details: CompletionTokensDetails


class StageMetrics(msgspec.Struct, frozen=True):
    """Seconds that the request waited for a stage and ran in it."""

    queue_s: float
    run_s: float


class Metrics(msgspec.Struct, frozen=True):
    """The time in each stage; ``total_s`` is from the request's arrival to its last event."""

    stages: dict[Stage, StageMetrics]
    total_s: float


ImageReply = Literal["list", "images", "both"]


@dataclass(frozen=True)
class ReplyOptions:
    """The parts of a reply that a client may choose.

    ``images`` says where images are: ``list``, parts of the message's content;
    ``images``, its member of that name, beside a content that is a text; or both.
    """

    modality: Modality = "text"
    images: ImageReply = "both"
    include_usage: bool = False
    include_progress: bool = False
    include_reasoning: bool = True


class Header(msgspec.Struct, frozen=True):
    """The identity of a reply; ``started`` is ``time.perf_counter()`` at arrival."""

    id: str
    created: int
    model: str
    started: float


class ChatCompletion(msgspec.Struct, frozen=True):
    """The reply to a request that is not streamed.

    ``seed`` is that of the first choice or image; the others have those that follow.
    It is null for greedy text.
    """

    id: str
    created: int
    model: str
    choices: tuple[Choice, ...]
    usage: Usage
    seed: int | None
    metrics: Metrics
    object: Literal["chat.completion"] = "chat.completion"


def new_header(model: str) -> Header:
    """The header of a reply to a request that arrives now."""
    return Header(f"chatcmpl-{uuid.uuid4().hex}", int(time.time()), model, time.perf_counter())


async def image_part(pixels: NDArray[np.uint8], index: int, seed: int) -> ImagePart:
    """``pixels`` [H, W, 3] as a part."""
    return ImagePart(ImageUrl(await data_url(pixels)), index, seed)


def logprobs(tokens: Sequence[protocol_events.TokenLogprob]) -> Logprobs | None:
    """``tokens`` in OpenAI's shape; None without any."""
    if not tokens:
        return None
    return Logprobs(
        tuple(
            ContentLogprob(
                token.token,
                token.logprob,
                token.bytes,
                tuple(TokenLogprob(other.token, other.logprob, other.bytes) for other in token.top),
            )
            for token in tokens
        )
    )


def usage(counts: StageUsage) -> Usage:
    """``counts`` in OpenAI's names."""
    completion = counts.text_tokens + counts.image_tokens
    details = CompletionTokensDetails(counts.image_tokens, counts.text_tokens, counts.reasoning_tokens)
    return Usage(counts.prompt_tokens, completion, counts.prompt_tokens + completion, details)


def metrics(done: DoneEvent, header: Header) -> Metrics:
    """The timings of a request that ends now."""
    stages = {stats.stage: StageMetrics(stats.queue_s, stats.run_s) for stats in done.stages}
    return Metrics(stages, time.perf_counter() - header.started)


def incomplete(header: Header, modality: Modality) -> Internal:
    """The error for a request that ended without the output it requested."""
    return Internal(f"{header.id} ended without {'an image' if modality == 'image' else 'an answer'}")


async def collect(responses: AsyncIterable[StageResponse], header: Header, options: ReplyOptions) -> ChatCompletion:
    """The completion that ``responses`` amount to.

    Raises:
        Internal: they end without an image, or without an answer.
    """
    images: list[ImagePart] = []
    answers: list[AnswerEvent] = []
    done: DoneEvent | None = None
    async for response in responses:
        event = response.event
        if isinstance(event, ImageEvent) and response.image is not None:
            images.append(await image_part(response.image, event.index, event.seed))
        elif isinstance(event, AnswerEvent):
            answers.append(event if options.include_reasoning else msgspec.structs.replace(event, reasoning=""))
        elif isinstance(event, DoneEvent):
            done = event
    if done is None or not (images if options.modality == "image" else answers):
        raise incomplete(header, options.modality)
    drawn = options.modality == "image"
    return ChatCompletion(
        id=header.id,
        created=header.created,
        model=header.model,
        choices=(_drawn(tuple(images), answers, options.images),) if drawn else tuple(map(_answered, answers)),
        usage=usage(done.usage),
        seed=done.seed,
        metrics=metrics(done, header),
    )


def _drawn(images: tuple[ImagePart, ...], thoughts: Sequence[AnswerEvent], where: ImageReply) -> Choice:
    message = AssistantMessage(
        content="" if where == "images" else images,
        reasoning_content="".join(thought.reasoning for thought in thoughts) or msgspec.UNSET,
        images=msgspec.UNSET if where == "list" else images,
    )
    return Choice(message, IMAGE_FINISH)


def _answered(answer: AnswerEvent) -> Choice:
    message = AssistantMessage(answer.content, answer.reasoning or msgspec.UNSET)
    return Choice(message, answer.finish_reason, answer.index, logprobs(answer.logprobs))
