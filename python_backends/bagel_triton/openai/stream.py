"""The streamed reply: server-sent events of ``chat.completion.chunk`` objects.

Every chunk has a choice, as many clients read the first one unasked; only the usage chunk,
which is sent on request, has none, as in OpenAI's API. A stream without news sends comment
lines, which no client shows.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Literal

import msgspec

from bagel_triton.openai.image_io import data_url
from bagel_triton.openai.reply import (
    IMAGE_FINISH,
    Header,
    ImagePart,
    Logprobs,
    Metrics,
    ReplyOptions,
    Usage,
    image_part,
    incomplete,
    logprobs,
    metrics,
    usage,
)
from bagel_triton.openai.sse import KEEP_ALIVE, EventStream
from bagel_triton.protocol.events import (
    AnswerEvent,
    DoneEvent,
    ImageEvent,
    PartialImageEvent,
    ProgressEvent,
    Stage,
    TextEvent,
)
from bagel_triton.triton.client import StageResponse

_DONE = b"data: [DONE]\n\n"


class Progress(msgspec.Struct, frozen=True):
    """``step`` of ``steps`` updates are done in ``stage``; 0 of 0 while the request waits for it."""

    stage: Stage
    step: int
    steps: int


class PartialImage(msgspec.Struct, frozen=True):
    """Preview ``partial_image_index`` of image ``index``, as a ``data:`` URL."""

    index: int
    partial_image_index: int
    url: str


class Delta(msgspec.Struct, frozen=True, omit_defaults=True):
    """An addition to the message."""

    role: str | None = None
    content: str | tuple[ImagePart, ...] | None = None
    reasoning_content: str | None = None
    images: tuple[ImagePart, ...] | None = None


class ChunkChoice(msgspec.Struct, frozen=True):
    """A chunk's part of one choice."""

    delta: Delta
    finish_reason: str | None = None
    index: int = 0
    logprobs: Logprobs | None = None


class Chunk(msgspec.Struct, frozen=True):
    """One event. ``usage`` is there (null but for the last) if it was requested."""

    id: str
    created: int
    model: str
    choices: tuple[ChunkChoice, ...] = (ChunkChoice(Delta()),)
    usage: Usage | msgspec.UnsetType | None = msgspec.UNSET
    progress: Progress | msgspec.UnsetType = msgspec.UNSET
    partial_image: PartialImage | msgspec.UnsetType = msgspec.UNSET
    seed: int | msgspec.UnsetType | None = msgspec.UNSET
    metrics: Metrics | msgspec.UnsetType = msgspec.UNSET
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"


def encode(event: msgspec.Struct) -> bytes:
    """``event`` as a server-sent event."""
    return b"data: " + msgspec.json.encode(event) + b"\n\n"


async def chunks(
    responses: AsyncGenerator[StageResponse, None], header: Header, options: ReplyOptions
) -> AsyncGenerator[bytes, None]:
    """The server-sent events that ``responses`` become; closes ``responses`` at the end.

    Raises:
        Internal: they end without an image, or without an answer.
    """
    base = Chunk(header.id, header.created, header.model, usage=None if options.include_usage else msgspec.UNSET)
    reasons: dict[int, str] = {}  # why each choice ended
    opened: set[int] = set()
    done: DoneEvent | None = None
    async with aclosing(responses):
        async for response in responses:
            event = response.event
            if isinstance(event, DoneEvent):
                done = event
            elif isinstance(event, ProgressEvent):
                progress = Progress(event.stage, event.step, event.steps)
                shown = encode(msgspec.structs.replace(base, progress=progress))
                yield shown if options.include_progress else KEEP_ALIVE
            elif isinstance(event, PartialImageEvent):
                if response.image is not None:
                    url = await data_url(response.image)
                    partial = PartialImage(event.index, event.partial_index, url)
                    yield encode(msgspec.structs.replace(base, partial_image=partial))
            elif isinstance(event, TextEvent) and event.channel == "reasoning" and not options.include_reasoning:
                yield KEEP_ALIVE
            else:
                choice = 0 if isinstance(event, ImageEvent) else event.index
                if choice not in opened:
                    opened.add(choice)
                    opening = ChunkChoice(Delta(role="assistant"), index=choice)
                    yield encode(msgspec.structs.replace(base, choices=(opening,)))
                if (delta := await _delta(response, options)) is not None:
                    said = logprobs(event.logprobs) if isinstance(event, TextEvent) else None
                    addition = ChunkChoice(delta, index=choice, logprobs=said)
                    yield encode(msgspec.structs.replace(base, choices=(addition,)))
                if isinstance(event, ImageEvent):
                    reasons[choice] = IMAGE_FINISH
                elif isinstance(event, AnswerEvent) and options.modality == "text":
                    reasons[choice] = event.finish_reason
    if done is None or not reasons:
        raise incomplete(header, options.modality)
    *others, last = (ChunkChoice(Delta(), reason, choice) for choice, reason in reasons.items())
    for other in others:
        yield encode(msgspec.structs.replace(base, choices=(other,)))
    yield encode(msgspec.structs.replace(base, choices=(last,), seed=done.seed, metrics=metrics(done, header)))
    if options.include_usage:
        yield encode(msgspec.structs.replace(base, choices=(), usage=usage(done.usage)))


async def _delta(response: StageResponse, options: ReplyOptions) -> Delta | None:
    """The addition of ``response`` to a message; none from a whole answer, which repeats its pieces."""
    event = response.event
    if isinstance(event, ImageEvent) and response.image is not None:
        images = (await image_part(response.image, event.index, event.seed),)
        return Delta(
            content=None if options.images == "images" else images,
            images=None if options.images == "list" else images,
        )
    if isinstance(event, TextEvent):
        return Delta(content=event.text) if event.channel == "content" else Delta(reasoning_content=event.text)
    return None


def event_stream(first: bytes, rest: AsyncGenerator[bytes, None]) -> EventStream:
    """The reply of ``first`` and ``rest``, ended as chat clients expect."""
    return EventStream(first, rest, failed=encode, end=_DONE)
