"""Server-sent events as the proxy sends them, and clients that leave while it does."""

from __future__ import annotations

import asyncio
import json
import socket
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from proxy_fake import (
    A_CAT,
    CHAT,
    DONE,
    IMAGE,
    ONE_ANSWER,
    PREVIEW,
    PROGRESS,
    SILENCE,
    THOUGHT_IMAGES,
    TWO_ANSWERS,
    FakeClient,
    answer,
    chat_body,
    live_proxy,
    text,
)
from starlette.requests import ClientDisconnect

from bagel_triton.openai import sse
from bagel_triton.openai.reply import ReplyOptions, new_header
from bagel_triton.openai.sse import EventStream
from bagel_triton.openai.stream import chunks
from bagel_triton.protocol.errors import StageUnavailable
from bagel_triton.protocol.request import GenerationRequest
from tests.support.waiting import soon


def events(url: str, **fields: object) -> list[Any]:
    """The payloads of the server-sent events of a streamed request."""
    reply = httpx.post(f"{url}/v1/chat/completions", json=chat_body(stream=True, **fields), trust_env=False)
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert (reply.headers["cache-control"], reply.headers["x-accel-buffering"]) == ("no-cache", "no")
    lines = [line for line in reply.text.split("\n\n") if line and not line.startswith(":")]
    payloads = [line.removeprefix("data: ") for line in lines]
    return [payload if payload == "[DONE]" else json.loads(payload) for payload in payloads]


def test_every_chunk_has_a_choice_and_progress_comes_only_if_asked_for() -> None:
    with live_proxy(FakeClient(*PROGRESS, PREVIEW, IMAGE, DONE)) as url:
        *plain, _ = events(url)
        *told, _ = events(url, stream_options={"include_progress": True})
    assert all(len(chunk["choices"]) == 1 for chunk in (*plain, *told))
    assert not any("progress" in chunk for chunk in plain)
    shown = [chunk for chunk in told if "progress" in chunk]
    assert [chunk["progress"] for chunk in shown] == [{"stage": "dit", "step": n, "steps": 3} for n in (1, 2, 3)]
    assert [chunk["choices"][0]["delta"] for chunk in shown] == [{}] * 3


def test_a_preview_is_a_member_of_a_chunk_that_adds_nothing() -> None:
    with live_proxy(FakeClient(PREVIEW, IMAGE, DONE)) as url:
        first, *_ = events(url, partial_images=1)
    assert first["choices"][0]["delta"] == {}
    assert (first["partial_image"]["index"], first["partial_image"]["partial_image_index"]) == (0, 1)
    assert first["partial_image"]["url"].startswith("data:image/png;base64,")


@pytest.mark.parametrize(
    ("where", "members"), [(None, ["images"]), ("list", ["content"]), ("both", ["content", "images"])]
)
def test_streamed_images_are_numbered(where: str | None, members: list[str]) -> None:
    with live_proxy(FakeClient(*THOUGHT_IMAGES)) as url:
        *chunks, _ = events(url, n=2, image_reply=where)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    for member in ("images", "content"):
        numbers = [image["index"] for delta in deltas for image in delta.get(member, [])]
        assert numbers == ([0, 1] if member in members else [])


LEFT_OUT: list[dict[str, object]] = [{"reasoning": {"exclude": True}}, {"include_reasoning": False}]


@pytest.mark.parametrize("fields", LEFT_OUT, ids=str)
@pytest.mark.parametrize(("script", "modality"), [(THOUGHT_IMAGES, "image"), (TWO_ANSWERS, "text")])
def test_the_thought_may_be_left_out(script: tuple[object, ...], modality: str, fields: dict[str, object]) -> None:
    wanted: dict[str, Any] = {"modalities": [modality], "n": 2, "think": True}
    with live_proxy(FakeClient(*script)) as url:
        shown = events(url, **wanted)[:-1]
        *hidden, _ = events(url, **wanted, **fields)
        whole = httpx.post(f"{url}{CHAT}", json=chat_body(**wanted, **fields), trust_env=False).json()

    def deltas(chunks: list[Any]) -> list[Any]:
        return [(choice["index"], choice["delta"]) for chunk in chunks for choice in chunk["choices"]]

    thinking = [delta for delta in deltas(shown) if "reasoning_content" in delta[1]]
    assert thinking
    rest = sorted((delta for delta in deltas(shown) if delta not in thinking), key=str)
    assert sorted(deltas(hidden), key=str) == rest
    assert not any("reasoning_content" in choice["message"] for choice in whole["choices"])
    assert whole["usage"]["completion_tokens_details"]["reasoning_tokens"] == 4


def test_a_silent_stream_is_kept_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "KEEP_ALIVE_S", 0.01)
    backend = FakeClient(text(0, "content", "Par"), SILENCE)
    with (
        live_proxy(backend) as url,
        httpx.stream(
            "POST", f"{url}/v1/chat/completions", json=chat_body(stream=True, modalities=["text"]), trust_env=False
        ) as reply,
    ):
        comments = (line for line in reply.iter_lines() if line.startswith(":"))
        assert [next(comments) for _ in range(3)] == [": keep-alive"] * 3
    assert backend.cancelled.wait(10)


def test_greedy_text_streams_without_a_seed() -> None:
    with live_proxy(FakeClient(*ONE_ANSWER)) as url:
        *chunks, done = events(url, modalities=["text"])
    assert done == "[DONE]"
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [
        {"role": "assistant"},
        {"content": "Par"},
        {"content": "is"},
        {},
    ]
    assert chunks[-1]["seed"] is None


def test_an_answer_of_no_text_is_still_a_choice() -> None:
    with live_proxy(FakeClient(answer(0, ""), DONE)) as url:
        opening, finish, _ = events(url, modalities=["text"])
    assert opening["choices"][0]["delta"] == {"role": "assistant"}
    assert finish["choices"][0]["finish_reason"] == "stop"


def test_the_stream_ends_with_done_and_has_usage_only_if_asked_for() -> None:
    with live_proxy(FakeClient()) as url:
        plain = events(url)
        counted = events(url, stream_options={"include_usage": True})
    assert plain[-1] == counted[-1] == "[DONE]"
    assert not any("usage" in chunk for chunk in plain)
    *nulls, last = counted[:-1]
    assert all(chunk["usage"] is None for chunk in nulls)
    assert last["usage"]["total_tokens"] == 11


def test_an_error_after_the_first_event_is_an_event_and_the_last() -> None:
    with live_proxy(FakeClient(*PROGRESS, StageUnavailable("dit died"))) as url:
        raw = events(url)
    assert len(raw) == 1
    assert raw[-1]["error"].pop("request_id").startswith("req_")
    assert raw[-1]["error"] == {
        "message": "dit died",
        "type": "service_unavailable_error",
        "param": None,
        "code": "stage_unavailable",
    }


@pytest.mark.parametrize(
    ("modality", "script", "missing"),
    [
        ("image", (*PROGRESS, DONE), "without an image"),
        ("image", (*THOUGHT_IMAGES[:3], DONE), "without an image"),
        ("text", (*ONE_ANSWER[:2], DONE), "without an answer"),
    ],
)
def test_a_stream_that_lacks_something_ends_in_an_error(
    modality: str, script: tuple[object, ...], missing: str
) -> None:
    with live_proxy(FakeClient(*script)) as url:
        last = events(url, modalities=[modality])[-1]
    assert missing in last["error"]["message"]


@pytest.mark.parametrize(
    ("stream", "script"),
    [(False, (SILENCE,)), (False, (*PROGRESS, SILENCE)), (True, (SILENCE,)), (True, (*PROGRESS, IMAGE, SILENCE))],
    ids=["plain, queued", "plain, denoising", "stream, queued", "stream, denoising"],
)
def test_a_client_that_leaves_cancels_its_request(stream: bool, script: tuple[object, ...]) -> None:
    backend = FakeClient(*script)
    with live_proxy(backend) as url:
        address = urlsplit(url)
        body = json.dumps(chat_body(stream=stream)).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: proxy\r\nContent-Length: {len(body)}\r\n\r\n"
        with socket.create_connection((address.hostname, address.port)) as connection:
            connection.sendall(head.encode() + body)
            assert soon(lambda: bool(backend.requests))
            assert not backend.cancelled.wait(0.1)
        assert backend.cancelled.wait(10)


def test_a_connection_that_breaks_while_sending_cancels_its_request() -> None:
    backend = FakeClient()

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            raise BrokenPipeError

    async def session() -> None:
        responses = backend.generate(GenerationRequest(messages=A_CAT), "r", {})
        rest = chunks(responses, new_header("bagel"), ReplyOptions("image"))
        reply = EventStream(await anext(rest), rest)
        with pytest.raises(ClientDisconnect):
            await reply({"type": "http", "asgi": {"spec_version": "2.4"}}, asyncio.Event().wait, send)
        assert backend.cancelled.is_set()

    asyncio.run(session())
