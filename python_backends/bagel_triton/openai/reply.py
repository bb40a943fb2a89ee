"""The chat completion: what a request that succeeded is answered with."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterable, Sequence
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from bagel_triton.openai.image_source import data_url
from bagel_triton.protocol.errors import Internal
from bagel_triton.protocol.events import AnswerEvent, DoneEvent, ImageEvent, Stage
from bagel_triton.protocol.messages import Usage as StageUsage
from bagel_triton.protocol.request import Modality
from bagel_triton.triton.async_client import StageResponse

IMAGE_FINISH = "stop"  # an image is never cut short


class ImageUrl(msgspec.Struct, frozen=True):
    """An image as a ``data:`` URL."""

    url: str


class ImagePart(msgspec.Struct, frozen=True):
    """An image among a message's parts, and the seed it was made with."""

    image_url: ImageUrl
    seed: int
    type: Literal["image_url"] = "image_url"


class AssistantMessage(msgspec.Struct, frozen=True):
    """The model's answer, and what was thought before it, if anything was."""

    content: str | tuple[ImagePart, ...]
    reasoning_content: str | msgspec.UnsetType = msgspec.UNSET
    role: Literal["assistant"] = "assistant"


class Choice(msgspec.Struct, frozen=True):
    """One of a completion's answers."""

    message: AssistantMessage
    finish_reason: str
    index: int = 0
    logprobs: None = None


class CompletionTokensDetails(msgspec.Struct, frozen=True):
    """What the completion's tokens are: latent tokens of images, and text, some of it thinking."""

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
    """Seconds a stage kept the request waiting and worked on it."""

    queue_s: float
    run_s: float


class Metrics(msgspec.Struct, frozen=True):
    """Where the time went; ``total_s`` is from the request's arrival to its last event."""

    stages: dict[Stage, StageMetrics]
    total_s: float


class Header(msgspec.Struct, frozen=True):
    """What identifies a reply; ``started`` is ``time.perf_counter()`` at arrival."""

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


async def image_part(pixels: NDArray[np.uint8], seed: int) -> ImagePart:
    """``pixels`` [H, W, 3] as a part; compressed in a thread, as it takes long."""
    return ImagePart(ImageUrl(await asyncio.to_thread(data_url, pixels)), seed)


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
    """The error for a request that ended without what it asked for."""
    return Internal(f"{header.id} ended without {'an image' if modality == 'image' else 'an answer'}")


async def collect(responses: AsyncIterable[StageResponse], header: Header, modality: Modality) -> ChatCompletion:
    """The completion that ``responses`` amount to.

    Raises:
        Internal: they end without an image, or without an answer.
    """
    parts: list[ImagePart] = []
    answers: list[AnswerEvent] = []
    done: DoneEvent | None = None
    async for response in responses:
        event = response.event
        if isinstance(event, ImageEvent) and response.image is not None:
            parts.append(await image_part(response.image, event.seed))
        elif isinstance(event, AnswerEvent):
            answers.append(event)
        elif isinstance(event, DoneEvent):
            done = event
    if done is None or not (parts if modality == "image" else answers):
        raise incomplete(header, modality)
    return ChatCompletion(
        id=header.id,
        created=header.created,
        model=header.model,
        choices=(_drawn(parts, answers),) if modality == "image" else tuple(_answered(answer) for answer in answers),
        usage=usage(done.usage),
        seed=done.seed,
        metrics=metrics(done, header),
    )


def _drawn(parts: Sequence[ImagePart], thoughts: Sequence[AnswerEvent]) -> Choice:
    reasoning = "".join(thought.reasoning for thought in thoughts)
    return Choice(AssistantMessage(tuple(parts), reasoning or msgspec.UNSET), IMAGE_FINISH)


def _answered(answer: AnswerEvent) -> Choice:
    message = AssistantMessage(answer.content, answer.reasoning or msgspec.UNSET)
    return Choice(message, answer.finish_reason, answer.index)
