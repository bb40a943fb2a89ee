"""The streamed reply: server-sent events of ``chat.completion.chunk`` objects."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Literal

import msgspec
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from bagel_triton.openai.errors import error_body, to_bagel_error
from bagel_triton.openai.reply import (
    IMAGE_FINISH,
    Header,
    ImagePart,
    Metrics,
    Usage,
    image_part,
    incomplete,
    metrics,
    usage,
)
from bagel_triton.protocol.events import AnswerEvent, DoneEvent, Event, ImageEvent, ProgressEvent, Stage, TextEvent
from bagel_triton.protocol.request import Modality
from bagel_triton.triton.async_client import StageResponse

_DONE = b"data: [DONE]\n\n"


class Progress(msgspec.Struct, frozen=True):
    """``step`` of ``steps`` updates are done in ``stage``."""

    stage: Stage
    step: int
    steps: int


class Delta(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a chunk adds to the message."""

    role: str | None = None
    content: str | tuple[ImagePart, ...] | None = None
    reasoning_content: str | None = None


class ChunkChoice(msgspec.Struct, frozen=True):
    """A chunk's part of one choice."""

    delta: Delta
    finish_reason: str | None = None
    index: int = 0
    logprobs: None = None


class Chunk(msgspec.Struct, frozen=True):
    """One event. ``usage`` is there (null but for the last) if it was asked for."""

    id: str
    created: int
    model: str
    choices: tuple[ChunkChoice, ...] = ()
    usage: Usage | msgspec.UnsetType | None = msgspec.UNSET
    progress: Progress | msgspec.UnsetType = msgspec.UNSET
    seed: int | msgspec.UnsetType | None = msgspec.UNSET
    metrics: Metrics | msgspec.UnsetType = msgspec.UNSET
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"


def encode(event: msgspec.Struct) -> bytes:
    """``event`` as a server-sent event."""
    return b"data: " + msgspec.json.encode(event) + b"\n\n"


async def chunks(
    responses: AsyncGenerator[StageResponse, None], header: Header, modality: Modality, include_usage: bool
) -> AsyncGenerator[Chunk, None]:
    """The chunks that ``responses`` become; closes ``responses`` at the end.

    Raises:
        Internal: they end without an image, or without an answer.
    """
    base = Chunk(header.id, header.created, header.model, usage=None if include_usage else msgspec.UNSET)
    reasons: dict[int, str] = {}  # why each choice ended
    opened: set[int] = set()
    done: DoneEvent | None = None
    async with aclosing(responses):
        async for response in responses:
            event = response.event
            if isinstance(event, ProgressEvent):
                progress = Progress(event.stage, event.step, event.steps)
                yield msgspec.structs.replace(base, progress=progress)
                continue
            if isinstance(event, DoneEvent):
                done = event
                continue
            choice = 0 if isinstance(event, ImageEvent) else event.index
            if choice not in opened:
                opened.add(choice)
                yield msgspec.structs.replace(base, choices=(ChunkChoice(Delta(role="assistant"), index=choice),))
            if (delta := await _delta(response)) is not None:
                yield msgspec.structs.replace(base, choices=(ChunkChoice(delta, index=choice),))
            if isinstance(event, ImageEvent):
                reasons[choice] = IMAGE_FINISH
            elif isinstance(event, AnswerEvent) and modality == "text":
                reasons[choice] = event.finish_reason
    if done is None or not reasons:
        raise incomplete(header, modality)
    *others, last = (ChunkChoice(Delta(), reason, choice) for choice, reason in reasons.items())
    for other in others:
        yield msgspec.structs.replace(base, choices=(other,))
    yield msgspec.structs.replace(base, choices=(last,), seed=done.seed, metrics=metrics(done, header))
    if include_usage:
        yield msgspec.structs.replace(base, usage=usage(done.usage))


async def _delta(response: StageResponse) -> Delta | None:
    """What ``response`` adds to a message, if anything: a whole answer repeats what came in pieces."""
    event: Event = response.event
    if isinstance(event, ImageEvent) and response.image is not None:
        return Delta(content=(await image_part(response.image, event.seed),))
    if isinstance(event, TextEvent):
        return Delta(content=event.text) if event.channel == "content" else Delta(reasoning_content=event.text)
    return None


class EventStream(StreamingResponse):
    """A reply whose ``first`` chunk is known to exist, so that 200 is its true status."""

    def __init__(self, first: Chunk, rest: AsyncGenerator[Chunk, None]) -> None:
        super().__init__(_events(first, rest), headers={"Cache-Control": "no-cache"}, media_type="text/event-stream")
        self._rest = rest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._rest):
            await super().__call__(scope, receive, send)


async def _events(first: Chunk, rest: AsyncIterator[Chunk]) -> AsyncIterator[bytes]:
    yield encode(first)
    try:
        async for chunk in rest:
            yield encode(chunk)
    except Exception as error:
        # The status line is out: the error can only be an event.
        yield encode(error_body(to_bagel_error(error)))
    else:
        yield _DONE
