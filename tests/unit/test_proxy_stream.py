from __future__ import annotations

import asyncio
import base64
import io
import json
import socket
import time
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import openai
import pytest
from PIL import Image
from proxy_fake import (
    A_CAT,
    DONE,
    ONE_ANSWER,
    PICTURE,
    PIXELS,
    PROGRESS,
    SILENCE,
    THOUGHT_PICTURES,
    TWO_ANSWERS,
    FakeClient,
    answer,
    chat_body,
    live_proxy,
    text,
)
from starlette.requests import ClientDisconnect

from bagel_triton.errors import InvalidRequest, StageUnavailable
from bagel_triton.proxy.reply import new_header
from bagel_triton.proxy.stream import EventStream, chunks
from bagel_triton.request import GenerationRequest

MESSAGES: Any = [{"role": "user", "content": "A cute cat"}]


def pixels_of(part: Any) -> np.ndarray[Any, Any]:
    data = part["image_url"]["url"].partition(",")[2]
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def official(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def request(client: openai.OpenAI, **fields: Any) -> Any:
    extra = {"modalities": ["image"], "seed": 7, "extra_body": {"height": 32}}
    return client.chat.completions.create(model="bagel", messages=MESSAGES, extra_body=extra, **fields)


def events(url: str, **fields: object) -> list[Any]:
    """The payloads of the server-sent events of a streamed request."""
    reply = httpx.post(f"{url}/v1/chat/completions", json=chat_body(stream=True, **fields), trust_env=False)
    assert reply.headers["content-type"].startswith("text/event-stream")
    payloads = [line.removeprefix("data: ") for line in reply.text.split("\n\n") if line]
    return [payload if payload == "[DONE]" else json.loads(payload) for payload in payloads]


def test_the_official_client_reads_the_plain_reply() -> None:
    backend = FakeClient()
    with live_proxy(backend) as url, official(url) as client:
        reply = request(client)
        assert next(model.id for model in client.models.list()) == "bagel"
    np.testing.assert_array_equal(pixels_of(reply.choices[0].message.content[0]), PIXELS)
    assert reply.usage.total_tokens == 11
    assert reply.seed == 7
    assert (backend.requests[0].seed, backend.requests[0].height) == (7, 32)


def test_the_official_client_reads_the_stream() -> None:
    with live_proxy(FakeClient()) as url, official(url) as client:
        chunks = list(request(client, stream=True, stream_options={"include_usage": True}))
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    assert [chunk.progress for chunk in chunks[:3]] == [{"stage": "dit", "step": n, "steps": 3} for n in (1, 2, 3)]
    opening, picture, finish, usage = chunks[3:]
    assert opening.choices[0].delta.role == "assistant"
    np.testing.assert_array_equal(pixels_of(picture.choices[0].delta.content[0]), PIXELS)
    assert picture.choices[0].finish_reason is None
    assert (finish.choices[0].finish_reason, finish.choices[0].delta.content, finish.seed) == ("stop", None, 7)
    assert finish.metrics["stages"]["dit"] == {"queue_s": 1.0, "run_s": 2.0}
    assert (usage.choices, usage.usage.completion_tokens) == ([], 6)


def ask(client: openai.OpenAI, **fields: Any) -> Any:
    return client.chat.completions.create(model="bagel", messages=MESSAGES, **fields)


def test_the_official_client_reads_answers() -> None:
    with live_proxy(FakeClient(*TWO_ANSWERS)) as url, official(url) as client:
        reply = ask(client, n=2, temperature=1, modalities=["text"], extra_body={"think": True})
    first, second = reply.choices
    assert (first.message.content, first.message.reasoning_content, first.finish_reason) == (
        "Paris.",
        "Let me see.",
        "stop",
    )
    assert (second.index, second.message.content, second.finish_reason) == (1, "It is Lyon", "length")
    assert not hasattr(second.message, "reasoning_content")
    assert reply.usage.completion_tokens_details.reasoning_tokens == 4


def test_the_official_client_reads_streamed_answers() -> None:
    with live_proxy(FakeClient(*TWO_ANSWERS)) as url, official(url) as client:
        chunks = list(ask(client, n=2, temperature=1, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert (joined(chunks, 0, "reasoning_content"), joined(chunks, 0, "content")) == ("Let me see.", "Paris.")
    assert (joined(chunks, 1, "reasoning_content"), joined(chunks, 1, "content")) == ("", "It is Lyon")
    for index in (0, 1):
        roles = [choice.delta.role for choice in choices(chunks, index)]
        assert (roles[0], set(roles[1:])) == ("assistant", {None})
    ends = [[choice.finish_reason for choice in choices(chunks, index) if choice.finish_reason] for index in (0, 1)]
    assert ends == [["stop"], ["length"]]
    *_, finish, usage = chunks
    assert (finish.seed, list(finish.metrics["stages"])) == (11, ["thinker", "dit"])
    assert (usage.choices, usage.usage.completion_tokens) == ([], 9)


def choices(chunks: list[Any], index: int) -> list[Any]:
    return [choice for chunk in chunks for choice in chunk.choices if choice.index == index]


def joined(chunks: list[Any], index: int, field: str) -> str:
    return "".join(getattr(choice.delta, field, None) or "" for choice in choices(chunks, index))


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


def test_thinking_that_was_never_closed_comes_again_as_the_answer() -> None:
    script = (text(0, "reasoning", "Well"), text(0, "content", "<think>Well"), answer(0, "<think>Well"), DONE)
    with live_proxy(FakeClient(*script)) as url, official(url) as client:
        chunks = list(ask(client, stream=True, extra_body={"think": True}))
        reply = ask(client, extra_body={"think": True})
    assert joined(chunks, 0, "content") == reply.choices[0].message.content == "<think>Well"


def test_thinking_then_progress_then_pictures_are_streamed() -> None:
    with live_proxy(FakeClient(*THOUGHT_PICTURES)) as url, official(url) as client:
        chunks = list(request(client, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert joined(chunks[:3], 0, "reasoning_content") == "A cat, in snow."
    assert [chunk.progress["step"] for chunk in chunks[3:6]] == [1, 2, 3]
    first, second, finish = chunks[6:]
    [picture] = first.choices[0].delta.content
    np.testing.assert_array_equal(pixels_of(picture), PIXELS)
    [picture] = second.choices[0].delta.content
    np.testing.assert_array_equal(pixels_of(picture), PIXELS[::-1])
    assert picture["seed"] == 8
    assert finish.choices[0].finish_reason == "stop"


def test_the_stream_ends_with_done_and_has_usage_only_if_asked_for() -> None:
    with live_proxy(FakeClient()) as url:
        plain = events(url)
        counted = events(url, stream_options={"include_usage": True})
    assert plain[-1] == counted[-1] == "[DONE]"
    assert not any("usage" in chunk for chunk in plain)
    *nulls, last = counted[:-1]
    assert all(chunk["usage"] is None for chunk in nulls)
    assert last["usage"]["total_tokens"] == 11


def test_an_error_before_the_first_event_has_its_own_status() -> None:
    backend = FakeClient(InvalidRequest("height=7 is not allowed", "height"))
    with live_proxy(backend) as url, official(url) as client, pytest.raises(openai.BadRequestError) as caught:
        request(client, stream=True)
    assert caught.value.param == "extra_body.height"


def test_an_error_after_the_first_event_is_an_event_and_the_last() -> None:
    with live_proxy(FakeClient(*PROGRESS, StageUnavailable("dit died"))) as url, official(url) as client:
        raw = events(url)
        with pytest.raises(openai.APIError, match="dit died"):
            list(request(client, stream=True))
    assert len(raw) == 4
    assert raw[-1]["error"] == {
        "message": "dit died",
        "type": "service_unavailable_error",
        "param": None,
        "code": "stage_unavailable",
    }


@pytest.mark.parametrize(
    ("modality", "script", "missing"),
    [
        ("image", (*PROGRESS, DONE), "without a picture"),
        ("image", (*THOUGHT_PICTURES[:3], DONE), "without a picture"),
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
    [(False, (SILENCE,)), (False, (*PROGRESS, SILENCE)), (True, (SILENCE,)), (True, (*PROGRESS, PICTURE, SILENCE))],
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
            deadline = time.monotonic() + 10
            while not backend.requests and time.monotonic() < deadline:
                time.sleep(0.01)
            assert backend.requests
            assert not backend.cancelled.wait(0.1)
        assert backend.cancelled.wait(10)


def test_a_connection_that_breaks_while_sending_cancels_its_request() -> None:
    backend = FakeClient()

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            raise BrokenPipeError

    async def session() -> None:
        responses = backend.generate(GenerationRequest(messages=A_CAT), "r", {})
        rest = chunks(responses, new_header("bagel"), "image", include_usage=False)
        reply = EventStream(await anext(rest), rest)
        with pytest.raises(ClientDisconnect):
            await reply({"type": "http", "asgi": {"spec_version": "2.4"}}, asyncio.Event().wait, send)
        assert backend.cancelled.is_set()

    asyncio.run(session())
