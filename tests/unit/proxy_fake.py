"""A Triton that plays a script, and a proxy in front of it on a real port."""

from __future__ import annotations

import asyncio
import base64
import json
import socket
import threading
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

import numpy as np
import pytest
import uvicorn
from numpy.typing import NDArray
from starlette.testclient import TestClient

from bagel_triton.deploy.topology import BAGEL
from bagel_triton.openai import chat as task
from bagel_triton.openai import chat_schema
from bagel_triton.openai.app import create_app
from bagel_triton.openai.image_fetch import RemoteImages
from bagel_triton.openai.image_io import ImageLoader
from bagel_triton.openai.settings import ProxySettings
from bagel_triton.protocol.adapters import AdapterCall, AdapterNames
from bagel_triton.protocol.errors import InvalidRequest
from bagel_triton.protocol.events import (
    AnswerEvent,
    DoneEvent,
    ImageEvent,
    PartialImageEvent,
    ProgressEvent,
    StageStats,
    TextEvent,
)
from bagel_triton.protocol.messages import Usage
from bagel_triton.protocol.request import GenerationRequest, ImageRef, TextPart, Turn
from bagel_triton.protocol.sleep import SleepCall, SleepState
from bagel_triton.triton.client import Readiness, StageResponse

NAMES = ("bagel", "ByteDance-Seed/BAGEL-7B-MoT")
SETTINGS = ProxySettings("127.0.0.1:1", NAMES, max_body_bytes=10_000, models=BAGEL.models)
PIXELS: NDArray[np.uint8] = np.random.default_rng(3).integers(0, 256, (32, 48, 3), dtype=np.uint8)
PROGRESS = [StageResponse(ProgressEvent("dit", step, 3)) for step in (1, 2, 3)]
IMAGE = StageResponse(ImageEvent(0, 32, 48, 7), PIXELS)
PREVIEW = StageResponse(PartialImageEvent(0, 1, 2, 3, 32, 48), PIXELS)
STAGES = (StageStats("thinker", 0.25, 0.5), StageStats("dit", 1.0, 2.0))
DONE = StageResponse(DoneEvent("r", 7, Usage(5, 0, 6), STAGES))
CHAT = "/v1/chat/completions"
SILENCE = object()
SCRIPT = (*PROGRESS, IMAGE, DONE)
PNG_URL = "data:image/png;base64," + base64.b64encode(b"an image").decode()


def text(index: int, channel: Literal["content", "reasoning"], piece: str) -> StageResponse:
    return StageResponse(TextEvent(index, channel, piece))


def answer(
    index: int, content: str, reasoning: str = "", finish_reason: Literal["stop", "length"] = "stop"
) -> StageResponse:
    return StageResponse(AnswerEvent(index, content, reasoning, finish_reason))


# Two answers that came interleaved, the first after some thinking.
TWO_ANSWERS = (
    text(0, "reasoning", "Let me"),
    text(1, "content", "It is"),
    text(0, "reasoning", " see."),
    text(0, "content", "Paris"),
    text(1, "content", " Lyon"),
    text(0, "content", "."),
    answer(0, "Paris.", "Let me see."),
    answer(1, "It is Lyon", finish_reason="length"),
    StageResponse(DoneEvent("r", 11, Usage(5, 9, 0, 4), STAGES)),
)
ONE_ANSWER = (
    text(0, "content", "Par"),
    text(0, "content", "is"),
    answer(0, "Paris"),
    StageResponse(DoneEvent("r", None, Usage(5, 2), STAGES)),
)
# Thinking, then images with seeds 7 and 8.
THOUGHT_IMAGES = (
    text(0, "reasoning", "A cat,"),
    text(0, "reasoning", " in snow."),
    answer(0, "", "A cat, in snow.", "length"),
    *PROGRESS,
    IMAGE,
    StageResponse(ImageEvent(1, 32, 48, 8), PIXELS[::-1]),
    StageResponse(DoneEvent("r", 7, Usage(5, 4, 12, 4), STAGES)),
)


class FakeClient:
    """Plays ``script`` to every request: responses, an exception to raise, or silence for ever."""

    def __init__(self, *script: object, ready: dict[str, bool] | Exception | None = None) -> None:
        self.script = script or SCRIPT
        self.ready = ready or dict.fromkeys(BAGEL.models, True)
        self.replicas: dict[str, str] = {}
        self.asleep: SleepState | None = None
        self.while_asleep: Literal["wait", "refuse"] = "wait"
        self.sleeps: list[SleepCall] = []
        self.loaded: list[str] = []
        self.adapter_calls: list[AdapterCall] = []
        self.requests: list[GenerationRequest] = []
        self.headers: list[dict[str, str]] = []
        self.cancelled = threading.Event()
        self.closed = False

    async def generate(
        self, request: GenerationRequest, request_id: str, headers: Mapping[str, str]
    ) -> AsyncGenerator[StageResponse, None]:
        self.requests.append(request)
        self.headers.append(dict(headers))
        try:
            for item in self.script:
                if item is SILENCE:
                    await asyncio.Event().wait()
                if isinstance(item, Exception):
                    raise item
                assert isinstance(item, StageResponse)
                yield item
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled.set()
            raise

    async def readiness(self) -> Readiness:
        if isinstance(self.ready, Exception):
            raise self.ready
        return Readiness(self.ready, self.replicas, self.asleep)

    async def sleep(self, call: SleepCall) -> SleepState:
        self.sleeps.append(call)
        if call.action != "state":
            self.asleep = SleepState("asleep", call.level, self.while_asleep) if call.action == "sleep" else None
        return self.asleep or SleepState("awake", 0, self.while_asleep)

    async def adapters(self, call: AdapterCall) -> AdapterNames:
        self.adapter_calls.append(call)
        if call.action == "load":
            self.loaded.append(call.name)
        elif call.action == "unload":
            self.loaded.remove(call.name)
        return AdapterNames(tuple(self.loaded), max_model_len=4096)

    async def close(self) -> None:
        self.closed = True


def chat_body(**fields: object) -> dict[str, object]:
    """A request for an image that is served, changed by ``fields``."""
    return {"messages": [{"role": "user", "content": "A cute cat"}], "modalities": ["image"]} | fields


def http(client: FakeClient) -> TestClient:
    """The proxy in front of ``client``, called in this process."""
    return TestClient(create_app(SETTINGS, client))


def generation(body: object) -> GenerationRequest:
    """The request that ``body`` becomes; remote images are switched off."""
    client = FakeClient()

    async def ask() -> None:
        wanted = task.to_task(chat_schema.parse(json.dumps(body).encode()))
        async for _ in wanted.run(client, ImageLoader(None), "r", {}):
            pass

    asyncio.run(ask())
    return client.requests[0]


def assert_refused(fields: Mapping[str, object], param: str, text: str) -> None:
    """A chat body with these ``fields`` is refused by the name of ``param``, and the error says ``text``."""
    with pytest.raises(InvalidRequest) as caught:
        generation(chat_body(**fields))
    assert caught.value.param == param
    assert text in caught.value.message
    assert param in caught.value.message


def image_part(url: str) -> dict[str, object]:
    return {"type": "image_url", "image_url": {"url": url}}


def user_turn(prompt: str, *images: int) -> Turn:
    return Turn("user", (TextPart(prompt), *map(ImageRef, images)))


A_CAT = (user_turn("A cute cat"),)


@contextmanager
def live_proxy(
    client: FakeClient, remote: RemoteImages | None = None, settings: ProxySettings = SETTINGS
) -> Iterator[str]:
    """The URL of a proxy in front of ``client``."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(create_app(settings, client, remote), log_config=None))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(timeout=20)
            assert not thread.is_alive()
