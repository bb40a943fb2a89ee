"""The events of a request as clients read them, and its times in the stages; JSON."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

import msgspec

from bagel_triton.protocol.messages import Message
from bagel_triton.protocol.messages import TokenLogprob as TokenLogprob
from bagel_triton.protocol.messages import Usage as Usage

Latents = TypeVar("Latents")
Stage = Literal["cfg_expand", "thinker", "dit", "vae_decode"]


class StageStats(Message, frozen=True):
    """The time one request spent in one stage, waiting and running, in seconds."""

    stage: Stage
    queue_s: float
    run_s: float


def encode_stats(stats: StageStats) -> bytes:
    """JSON of ``stats``: the stages' ``stats`` output."""
    return msgspec.json.encode(stats)


def decode_stats(data: bytes) -> StageStats:
    """The statistics in JSON ``data``; raises ``msgspec.ValidationError``."""
    return msgspec.json.decode(data, type=StageStats)


class ProgressEvent(Message, frozen=True, tag="progress"):
    """``step`` of ``steps`` updates are done; 0 of 0 while the request waits for the stage."""

    stage: Stage
    step: int
    steps: int


class TextEvent(Message, frozen=True, tag="text", omit_defaults=True):
    """More text of answer ``index``.

    ``logprobs`` are of the answer's tokens decoded since the last event of this answer.
    """

    index: int
    channel: Literal["content", "reasoning"]
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


class AnswerEvent(Message, frozen=True, tag="answer", omit_defaults=True):
    """The whole answer ``index``; ``content`` is empty if an image follows.

    ``logprobs`` has an entry for each token of ``content``.
    """

    index: int
    content: str
    reasoning: str
    finish_reason: Literal["stop", "length"]
    logprobs: tuple[TokenLogprob, ...] = ()


class PartialImageEvent(Message, frozen=True, tag="partial_image"):
    """Describes the ``generated_image`` of the same response, a preview of image ``index``.

    ``partial_index`` counts the previews of that image from 0; ``step`` of ``steps`` updates
    were done when it was made. Sizes are in pixels.
    """

    index: int
    partial_index: int
    step: int
    steps: int
    height: int
    width: int


class ImageEvent(Message, frozen=True, tag="image"):
    """Describes the ``generated_image`` of the same response, a finished image; sizes in pixels."""

    index: int
    height: int
    width: int
    seed: int


class DoneEvent(Message, frozen=True, tag="done"):
    """The last event of a request that succeeded."""

    request_id: str
    seed: int | None  # of the first image or answer; None for greedy text
    usage: Usage
    stages: tuple[StageStats, ...]


@dataclass(frozen=True)
class Preview(Generic[Latents]):
    """The DiT's report of a preview: the clean latents it predicts, to be decoded. Clients never see it."""

    event: PartialImageEvent
    latents: Latents


Event = ProgressEvent | TextEvent | AnswerEvent | PartialImageEvent | ImageEvent | DoneEvent


def encode_event(event: Event) -> bytes:
    """JSON of ``event``, its kind under ``type``."""
    return msgspec.json.encode(event)


_EVENTS: msgspec.json.Decoder[Event] = msgspec.json.Decoder(Event)


def decode_event(data: bytes | str) -> Event:
    """The event in JSON ``data``; raises ``msgspec.ValidationError``."""
    return _EVENTS.decode(data)
