"""The Responses API with OpenAI's own client, over ASGI, before a Triton that plays a script."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image
from proxy_fake import (
    DONE,
    IMAGE,
    ONE_ANSWER,
    PIXELS,
    PROGRESS,
    SETTINGS,
    STAGES,
    THOUGHT_IMAGES,
    FakeClient,
    answer,
    text,
)
from proxy_fake import http as api
from starlette.testclient import TestClient

from bagel_triton.openai.app import create_app
from bagel_triton.protocol import errors
from bagel_triton.protocol.events import DoneEvent, PartialImageEvent
from bagel_triton.protocol.messages import Usage
from bagel_triton.protocol.request import GenerationRequest, ImageRef, TextPart, Turn
from bagel_triton.triton.client import StageResponse

RESPONSES = "/v1/responses"
LARGE_BODIES = dataclasses.replace(SETTINGS, max_body_bytes=1_000_000)
TOOL: Any = {"type": "image_generation"}
THOUGHT_ANSWER = (
    text(0, "reasoning", "Let me"),
    text(0, "reasoning", " see."),
    text(0, "content", "Par"),
    text(0, "content", "is"),
    answer(0, "Paris", "Let me see."),
    StageResponse(DoneEvent("r", None, Usage(5, 9, 0, 4), STAGES)),
)
PREVIEW = StageResponse(PartialImageEvent(0, 0, 1, 3, 32, 48), PIXELS)
PNG = base64.b64encode(b"an image").decode()
URL = f"data:image/png;base64,{PNG}"


@contextmanager
def official(client: FakeClient) -> Iterator[openai.OpenAI]:
    """OpenAI's client before the API in this process."""
    with (
        TestClient(create_app(LARGE_BODIES, client), base_url="http://bagel.test") as transport,
        openai.OpenAI(base_url="http://bagel.test/v1", api_key="none", max_retries=0, http_client=transport) as sdk,
    ):
        yield sdk


def user(content: str) -> Turn:
    return Turn("user", (TextPart(content),))


def pixels_of(result: str | None) -> np.ndarray[Any, Any]:
    assert result is not None
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(result))))


def test_a_text_is_answered() -> None:
    backend = FakeClient(*ONE_ANSWER)
    with official(backend) as client:
        reply = client.responses.create(
            model="bagel",
            input="What is the capital of France?",
            instructions="Be brief.",
            max_output_tokens=8,
            temperature=0.5,
            store=True,
            metadata={"a": "b"},
            include=["reasoning.encrypted_content"],
            text={"format": {"type": "text"}, "verbosity": "low"},
        )
    turns = (Turn("system", (TextPart("Be brief."),)), user("What is the capital of France?"))
    assert backend.requests == [GenerationRequest(messages=turns, modality="text", max_tokens=8, temperature=0.5)]
    assert (reply.output_text, reply.status, reply.model, reply.store) == ("Paris", "completed", "bagel", False)
    assert reply.usage is not None
    assert (reply.usage.input_tokens, reply.usage.output_tokens, reply.usage.total_tokens) == (5, 2, 7)


def test_an_answer_cut_short_is_incomplete() -> None:
    script = (answer(0, "Par", finish_reason="length"), DONE)
    with official(FakeClient(*script)) as client:
        reply = client.responses.create(model="bagel", input="Hi", max_output_tokens=1)
    assert reply.status == "incomplete"
    assert reply.incomplete_details is not None
    assert reply.incomplete_details.reason == "max_output_tokens"
    assert reply.output[0].status == "incomplete"


def test_a_conversation_with_images_and_earlier_items_goes_to_the_model_whole() -> None:
    backend = FakeClient(*ONE_ANSWER)
    items: Any = [
        {"role": "developer", "content": [{"type": "input_text", "text": "Be brief."}]},
        {
            "role": "user",
            "content": [
                {"type": "input_image", "image_url": URL, "detail": "auto"},
                {"type": "input_text", "text": "What is it?"},
            ],
        },
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
        {
            "type": "message",
            "id": "msg_1",
            "role": "assistant",
            "status": "completed",
            "content": [{"type": "output_text", "text": "A cat.", "annotations": [], "logprobs": []}],
        },
        {"type": "image_generation_call", "id": "ig_1", "status": "completed", "result": PNG, "output_format": "png"},
        {"role": "user", "content": "And this?"},
    ]
    with official(backend) as client:
        client.responses.create(model="bagel", input=items)
    [request] = backend.requests
    assert request.messages == (
        Turn("system", (TextPart("Be brief."),)),
        Turn("user", (ImageRef(0), TextPart("What is it?"))),
        Turn("assistant", (TextPart("A cat."),)),
        Turn("assistant", (ImageRef(1),)),
        user("And this?"),
    )
    assert request.image == (b"an image", b"an image")


def test_what_a_reply_holds_may_be_sent_back_as_it_came() -> None:
    for script, tools in ((THOUGHT_ANSWER, []), (THOUGHT_IMAGES, [TOOL])):
        backend = FakeClient(*script)
        with official(backend) as client:
            first = client.responses.create(model="bagel", input="Hi", tools=tools)
            user_item: Any = {"role": "user", "content": "Go on"}
            history: Any = [{"role": "user", "content": "Hi"}, *[item.model_dump() for item in first.output]]
            client.responses.create(model="bagel", input=[*history, user_item], tools=tools)
        assert backend.requests[1].messages is not None
        assert backend.requests[1].messages[-1] == user("Go on")


@pytest.mark.parametrize("effort", ["low", "medium", "high"])
def test_thinking_is_a_reasoning_item(effort: Any) -> None:
    backend = FakeClient(*THOUGHT_ANSWER)
    with official(backend) as client:
        reply = client.responses.create(model="bagel", input="Hi", reasoning={"effort": effort})
    reasoning, message = reply.output
    assert backend.requests[0].think
    assert reasoning.type == "reasoning"
    assert [part.text for part in reasoning.content or []] == ["Let me see."]
    assert message.type == "message"
    assert reply.output_text == "Paris"
    assert reply.usage is not None
    assert reply.usage.output_tokens_details.reasoning_tokens == 4


def test_the_streams_helper_reads_text_and_thinking() -> None:
    with (
        official(FakeClient(*THOUGHT_ANSWER)) as client,
        client.responses.stream(model="bagel", input="Hi", reasoning={"effort": "low"}) as stream,
    ):
        events: list[Any] = list(stream)
        final = stream.get_final_response()
    assert [event.type for event in events] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.reasoning_text.delta",
        "response.reasoning_text.delta",
        "response.reasoning_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[0].response.output == []
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == "Paris"
    assert final.output_text == "Paris"
    assert final.output[0].content[0].text == "Let me see."  # type: ignore[union-attr, index]


def test_thinking_comes_as_a_summary_if_one_is_asked_for() -> None:
    with official(FakeClient(*THOUGHT_ANSWER)) as client:
        options: Any = {"effort": "low", "summary": "auto"}
        events: list[Any] = list(client.responses.create(model="bagel", input="Hi", reasoning=options, stream=True))
    deltas = [event.delta for event in events if event.type == "response.reasoning_summary_text.delta"]
    assert deltas == ["Let me", " see."]
    assert events[-1].response.output[0].summary[0].text == "Let me see."


def test_the_async_client_reads_the_stream() -> None:
    async def ask() -> str:
        transport = httpx.ASGITransport(create_app(SETTINGS, FakeClient(*ONE_ANSWER)))
        async with (
            httpx.AsyncClient(transport=transport) as http,
            openai.AsyncOpenAI(base_url="http://bagel.test/v1", api_key="none", http_client=http) as client,
            client.responses.stream(model="bagel", input="Hi") as stream,
        ):
            return (await stream.get_final_response()).output_text

    assert asyncio.run(ask()) == "Paris"


def test_the_image_tool_draws() -> None:
    backend = FakeClient()
    tool = {**TOOL, "size": "48x32", "quality": "high", "output_format": "png", "moderation": "low", "seed": 7}
    with official(backend) as client:
        reply = client.responses.create(model="bagel", input="A cat", tools=[tool], tool_choice={"type": TOOL["type"]})
    assert backend.requests == [
        GenerationRequest(messages=(user("A cat"),), modality="image", width=48, height=32, seed=7)
    ]
    call, message = reply.output
    assert message.type == "message"  # without one OpenAI's Agents SDK takes the turn for unfinished
    assert reply.output_text == ""
    assert call.type == "image_generation_call"
    np.testing.assert_array_equal(pixels_of(call.result), PIXELS)
    assert (call.status, call.size, call.output_format, call.action) == ("completed", "48x32", "png", "generate")


def test_the_tool_that_may_not_be_used_draws_nothing() -> None:
    backend = FakeClient(*ONE_ANSWER)
    with official(backend) as client:
        client.responses.create(model="bagel", input="A cat", tools=[TOOL], tool_choice="none")
    assert backend.requests[0].modality == "text"


def test_the_streams_helper_reads_previews_and_the_image() -> None:
    backend = FakeClient(PROGRESS[0], PREVIEW, *PROGRESS[1:], IMAGE, DONE)
    tool = {**TOOL, "partial_images": 1}
    with official(backend) as client, client.responses.stream(model="bagel", input="A cat", tools=[tool]) as stream:
        events: list[Any] = list(stream)
        final = stream.get_final_response()
    call = "response.image_generation_call"
    assert [event.type for event in events] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        f"{call}.in_progress",
        f"{call}.generating",
        f"{call}.partial_image",
        f"{call}.completed",
        "response.output_item.done",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert backend.requests[0].partial_images == 1
    np.testing.assert_array_equal(pixels_of(events[5].partial_image_b64), PIXELS)
    assert (events[5].partial_image_index, events[5].size) == (0, "48x32")
    np.testing.assert_array_equal(pixels_of(final.output[0].result), PIXELS)  # type: ignore[union-attr]


def test_several_images_after_a_thought_are_calls_of_their_own() -> None:
    with official(FakeClient(*THOUGHT_IMAGES)) as client:
        events: list[Any] = list(
            client.responses.create(model="bagel", input="A cat", tools=[TOOL], stream=True, extra_body={"n": 2})
        )
    reasoning, first, second, _ = events[-1].response.output
    assert reasoning.content[0].text == first.revised_prompt == "A cat, in snow."
    np.testing.assert_array_equal(pixels_of(first.result), PIXELS)
    np.testing.assert_array_equal(pixels_of(second.result), PIXELS[::-1])


def test_a_failure_in_the_stream_is_a_failed_response() -> None:
    with official(FakeClient(*ONE_ANSWER[:1], errors.StageUnavailable("thinker died"))) as client:
        events: list[Any] = list(client.responses.create(model="bagel", input="Hi", stream=True))
    assert events[-1].type == "response.failed"
    assert (events[-1].response.error.code, events[-1].response.error.message) == ("server_error", "thinker died")
    assert events[-1].response.output[0].status == "incomplete"


@pytest.mark.parametrize("stream", [False, True])
def test_a_failure_before_the_first_event_has_its_status(stream: bool) -> None:
    refusal = errors.InvalidRequest("max_tokens=0 is not allowed; allowed: ...", "max_tokens")
    reply = api(FakeClient(refusal)).post(RESPONSES, json={"input": "Hi", "max_output_tokens": 0, "stream": stream})
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == "max_output_tokens"
    assert reply.json()["error"]["message"].startswith("max_output_tokens=0")
    default = api(FakeClient(refusal)).post(RESPONSES, json={"input": "Hi", "stream": stream}).json()["error"]
    assert (default["param"], default["message"][:19]) == ("max_output_tokens", "max_output_tokens=0")


@pytest.mark.parametrize(
    ("fields", "param", "advice"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id", "keeps no state"),
        ({"conversation": "conv_1"}, "conversation", "keeps no state"),
        ({"background": True}, "background", "use stream=true"),
        ({"prompt": {"id": "p"}}, "prompt", "write it into input"),
        ({"tools": [{"type": "function", "name": "f"}]}, "tools[0].type", "'image_generation', the only tool"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "'image_generation', the only tool"),
        ({"tools": [{**TOOL, "input_image_mask": {"image_url": URL}}]}, "tools[0].input_image_mask", "in the prompt"),
        ({"tools": [{**TOOL, "size": "huge"}]}, "tools[0].size", "'WIDTHxHEIGHT'"),
        ({"tools": [{**TOOL, "action": "edit"}]}, "tools[0].action", "without an image in input"),
        ({"tools": [{**TOOL, "background": "transparent"}]}, "tools[0].background", "opaque"),
        ({"tools": [{**TOOL, "seed": 1}], "seed": 2}, "tools[0].seed", "both given"),
        (
            {"text": {"format": {"type": "json_schema", "name": "n", "schema": {}}}},
            "text.format.type",
            "in the prompt",
        ),
        ({"include": ["message.output_text.logprobs"]}, "include[0]", "'reasoning.encrypted_content'"),
        ({"truncation": "first"}, "truncation", "input that does not fit"),
        ({"input": []}, "input", "at least 1"),
        ({"input": 7}, "input", "a text or a list of items"),
        ({"input": " "}, "input", "a text that is not empty"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type", "keeps no state"),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, "input[0].type", "calls no tools"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "f"}]}]},
            "input[0].content[0]",
            "input_image with image_url",
        ),
        (
            {"input": [{"role": "system", "content": [{"type": "input_image", "image_url": URL}]}]},
            "input[0].content[0].type",
            "'input_text'",
        ),
        ({"n": 2}, "n", "1 for text"),
        ({"instruction": "x"}, "instruction", "did you mean instructions?"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(fields: dict[str, Any], param: str, advice: str) -> None:
    backend = FakeClient(*ONE_ANSWER)
    reply = api(backend).post(RESPONSES, json={"input": "Hi", **fields})
    assert reply.status_code == 400, reply.text
    error = reply.json()["error"]
    assert (error["param"], advice in error["message"]) == (param, True), error
    assert backend.requests == []
