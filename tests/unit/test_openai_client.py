"""OpenAI's own client before the proxy: plain replies, streams and errors."""

from __future__ import annotations

import base64
import io
import warnings
from typing import Any

import numpy as np
import openai
import pytest
from PIL import Image
from proxy_fake import (
    DONE,
    PIXELS,
    PNG_URL,
    PREVIEW,
    PROGRESS,
    THOUGHT_IMAGES,
    TWO_ANSWERS,
    FakeClient,
    answer,
    image_part,
    live_proxy,
    text,
)

from bagel_triton.protocol.errors import InvalidRequest, StageUnavailable

MESSAGES: Any = [{"role": "user", "content": "A cute cat"}]


def pixels_of(part: Any) -> np.ndarray[Any, Any]:
    data = part["image_url"]["url"].partition(",")[2]
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def official(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def request(client: openai.OpenAI, messages: Any = MESSAGES, **fields: Any) -> Any:
    extra = {"modalities": ["image"], "seed": 7, "extra_body": {"height": 32}}
    return client.chat.completions.create(model="bagel", messages=messages, extra_body=extra, **fields)


def ask(client: openai.OpenAI, **fields: Any) -> Any:
    return client.chat.completions.create(model="bagel", messages=MESSAGES, **fields)


def choices(chunks: list[Any], index: int) -> list[Any]:
    return [choice for chunk in chunks for choice in chunk.choices if choice.index == index]


def joined(chunks: list[Any], index: int, field: str) -> str:
    return "".join(getattr(choice.delta, field, None) or "" for choice in choices(chunks, index))


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
    opening, image, finish, usage = chunks
    assert opening.choices[0].delta.role == "assistant"
    np.testing.assert_array_equal(pixels_of(image.choices[0].delta.images[0]), PIXELS)
    assert image.choices[0].finish_reason is None
    assert (finish.choices[0].finish_reason, finish.choices[0].delta.content, finish.seed) == ("stop", None, 7)
    assert finish.metrics["stages"]["dit"] == {"queue_s": 1.0, "run_s": 2.0}
    assert (usage.choices, usage.usage.completion_tokens) == ([], 6)


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


def test_thinking_that_was_never_closed_comes_again_as_the_answer() -> None:
    script = (text(0, "reasoning", "Well"), text(0, "content", "<think>Well"), answer(0, "<think>Well"), DONE)
    with live_proxy(FakeClient(*script)) as url, official(url) as client:
        chunks = list(ask(client, stream=True, extra_body={"think": True}))
        reply = ask(client, extra_body={"think": True})
    assert joined(chunks, 0, "content") == reply.choices[0].message.content == "<think>Well"


def test_thinking_then_progress_then_images_are_streamed() -> None:
    options = {"include_progress": True}
    with live_proxy(FakeClient(*THOUGHT_IMAGES)) as url, official(url) as client:
        chunks = list(request(client, stream=True, stream_options=options))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert joined(chunks[:3], 0, "reasoning_content") == "A cat, in snow."
    assert [chunk.progress["step"] for chunk in chunks[3:6]] == [1, 2, 3]
    first, second, finish = chunks[6:]
    [image] = first.choices[0].delta.images
    np.testing.assert_array_equal(pixels_of(image), PIXELS)
    [image] = second.choices[0].delta.images
    np.testing.assert_array_equal(pixels_of(image), PIXELS[::-1])
    assert image["seed"] == 8
    assert finish.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("options", [{}, {"include_progress": True}])
def test_the_stream_helper_adds_up_several_images(options: dict[str, bool]) -> None:
    extra = {"modalities": ["image"], "stream_options": options, "partial_images": 1}
    script = (PREVIEW, *THOUGHT_IMAGES)
    with (
        live_proxy(FakeClient(*script)) as url,
        official(url) as client,
        client.chat.completions.stream(model="bagel", messages=MESSAGES, n=2, extra_body=extra) as helper,
    ):
        assert [event.type for event in helper]
        message: Any = helper.get_final_completion().choices[0].message
    np.testing.assert_array_equal(pixels_of(message.images[0]), PIXELS)
    np.testing.assert_array_equal(pixels_of(message.images[1]), PIXELS[::-1])


def test_a_reply_dumped_by_the_official_client_can_be_sent_back() -> None:
    backend = FakeClient()
    with live_proxy(backend) as url, official(url) as client:
        reply = request(client).choices[0].message
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a list is no text to pydantic
            dumped = reply.model_dump()
        dumped["images"] = dumped["content"] = [image_part(PNG_URL)]  # the fake's own is larger than it takes
        request(client, messages=[*MESSAGES, dumped, *MESSAGES])
    assert backend.requests[1].image == (b"an image",)


def test_an_error_before_the_first_event_has_its_own_status() -> None:
    backend = FakeClient(InvalidRequest("height=7 is not allowed", "height"))
    with live_proxy(backend) as url, official(url) as client, pytest.raises(openai.BadRequestError) as caught:
        request(client, stream=True)
    assert caught.value.param == "extra_body.height"


def test_an_error_after_the_first_event_is_raised_by_the_official_client() -> None:
    with live_proxy(FakeClient(*PROGRESS, StageUnavailable("dit died"))) as url, official(url) as client:
        chunks = request(client, stream=True)
        with pytest.raises(openai.APIError, match="dit died"):
            list(chunks)
