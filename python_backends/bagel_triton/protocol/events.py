"""What a person or a client reads: a request's events and its times, as JSON."""

from __future__ import annotations

from typing import Literal

import msgspec

from bagel_triton.protocol.messages import Message, Usage

Stage = Literal["cfg_expand", "thinker", "dit", "vae_decode"]


class StageStats(Message, frozen=True):
    """Where one request's time went in one stage, in seconds."""

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
    """``step`` of ``steps`` updates are done; 0 of 0: the request waits for the stage."""

    stage: Stage
    step: int
    steps: int


class TextEvent(Message, frozen=True, tag="text"):
    """More text of answer ``index``."""

    index: int
    channel: Literal["content", "reasoning"]
    text: str


class AnswerEvent(Message, frozen=True, tag="answer"):
    """Answer ``index``, whole; ``content`` is empty where the thinking was for an image."""

    index: int
    content: str
    reasoning: str
    finish_reason: Literal["stop", "length"]


class ImageEvent(Message, frozen=True, tag="image"):
    """Describes the ``generated_image`` of the same response; sizes in pixels."""

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


Event = ProgressEvent | TextEvent | AnswerEvent | ImageEvent | DoneEvent


def encode_event(event: Event) -> bytes:
    """JSON of ``event``, its kind under ``type``."""
    return msgspec.json.encode(event)


_EVENTS: msgspec.json.Decoder[Event] = msgspec.json.Decoder(Event)


def decode_event(data: bytes | str) -> Event:
    """The event in JSON ``data``; raises ``msgspec.ValidationError``."""
    return _EVENTS.decode(data)
