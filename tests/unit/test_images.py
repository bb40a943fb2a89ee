"""The images endpoints with OpenAI's own client, over ASGI, before a Triton that plays a script."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import msgspec
import numpy as np
import openai
import pytest
from PIL import Image
from proxy_fake import IMAGE, ONE_ANSWER, PIXELS, PROGRESS, SETTINGS, STAGES, THOUGHT_IMAGES, FakeClient
from proxy_fake import http as api
from starlette.testclient import TestClient

from bagel_triton.openai import images
from bagel_triton.openai.app import create_app
from bagel_triton.openai.image_io import ImageStore
from bagel_triton.openai.images_schema import ImagesBody
from bagel_triton.openai.noop_fields import IGNORED, NOOP
from bagel_triton.openai.responses_schema import ResponsesBody
from bagel_triton.openai.schema import choosing_fields
from bagel_triton.openai.settings import HttpOptions
from bagel_triton.protocol import errors
from bagel_triton.protocol.events import DoneEvent, PartialImageEvent
from bagel_triton.protocol.messages import Usage
from bagel_triton.protocol.request import GenerationRequest, ImageRef, TextPart, Turn
from bagel_triton.triton.client import StageResponse

GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"
EDITED = StageResponse(DoneEvent("r", 7, Usage(105, 0, 6, 0, 100), STAGES))
PREVIEWS = [
    StageResponse(PartialImageEvent(0, index, index + 1, 3, 32, 48), PIXELS + np.uint8(index)) for index in range(2)
]


@contextmanager
def official(client: FakeClient) -> Iterator[openai.OpenAI]:
    """OpenAI's client before the API in this process."""
    with (
        TestClient(create_app(SETTINGS, client), base_url="http://bagel.test") as transport,
        openai.OpenAI(base_url="http://bagel.test/v1", api_key="none", max_retries=0, http_client=transport) as sdk,
    ):
        yield sdk


def decoded(image: str | None) -> Image.Image:
    assert image is not None
    return Image.open(io.BytesIO(base64.b64decode(image)))


def request_of(prompt: str, images: int = 0, **fields: Any) -> GenerationRequest:
    turn = Turn("user", (*map(ImageRef, range(images)), TextPart(prompt)))
    return GenerationRequest(messages=(turn,), modality="image", **fields)


def test_generation_is_answered_in_full() -> None:
    backend = FakeClient()
    with official(backend) as client:
        reply = client.images.generate(
            model="bagel",
            prompt="A cute cat",
            size="48x32",
            n=1,
            quality="high",
            background="auto",
            moderation="low",
            style="vivid",
            user="u",
            response_format="b64_json",
            extra_body={"seed": 7, "num_inference_steps": 4, "cfg_interval": [0.4, 1.0]},
        )
    assert backend.requests == [
        request_of("A cute cat", width=48, height=32, n=1, seed=7, num_inference_steps=4, cfg_interval=(0.4, 1.0))
    ]
    [image] = reply.data or []
    assert decoded(image.b64_json).format == "PNG"
    np.testing.assert_array_equal(np.asarray(decoded(image.b64_json)), PIXELS)
    assert (image.revised_prompt, image.url, image.seed) == (None, None, 7)  # type: ignore[attr-defined]
    assert (reply.size, reply.output_format, reply.quality, reply.background) == ("48x32", "png", "high", "opaque")
    assert reply.created > 0
    assert reply.usage is not None
    assert reply.usage.model_dump() == {
        "input_tokens": 5,
        "input_tokens_details": {"image_tokens": 0, "text_tokens": 5},
        "output_tokens": 6,
        "output_tokens_details": {"image_tokens": 6, "text_tokens": 0},
        "total_tokens": 11,
    }


@pytest.mark.parametrize("size", ["auto", None])
def test_an_automatic_size_is_the_models_own(size: Any) -> None:
    backend = FakeClient()
    with official(backend) as client:
        client.images.generate(prompt="A cute cat", size=size)
    assert backend.requests == [request_of("A cute cat")]


@pytest.mark.parametrize("file_format", ["png", "jpeg", "webp"])
def test_images_come_in_the_format_asked_for(file_format: Any) -> None:
    with official(FakeClient()) as client:
        reply = client.images.generate(prompt="A cute cat", output_format=file_format)
    image = decoded((reply.data or [])[0].b64_json)
    assert (image.format, image.size) == (file_format.upper(), (48, 32))
    assert reply.output_format == file_format


def test_compression_makes_a_smaller_file() -> None:
    with official(FakeClient()) as client:
        sizes = [
            len(
                (client.images.generate(prompt="x", output_format="jpeg", output_compression=q).data or [])[0].b64_json
                or ""
            )
            for q in (100, 20)
        ]
    assert sizes[1] < sizes[0] / 2


def test_the_thought_is_the_revised_prompt() -> None:
    backend = FakeClient(*THOUGHT_IMAGES)
    with official(backend) as client:
        reply = client.images.generate(prompt="A cute cat", n=2, extra_body={"think": True})
    first, second = reply.data or []
    assert first.revised_prompt == second.revised_prompt == "A cat, in snow."
    np.testing.assert_array_equal(np.asarray(decoded(second.b64_json)), PIXELS[::-1])
    assert backend.requests[0].think


def test_an_image_as_a_url_can_be_fetched_without_a_key_for_a_while() -> None:
    settings = dataclasses.replace(SETTINGS, http=HttpOptions(api_keys=("k",)))
    client = TestClient(create_app(settings, FakeClient()), base_url="http://bagel.test")
    body = {"prompt": "A cute cat", "response_format": "url"}
    [image] = client.post(GENERATIONS, json=body, headers={"Authorization": "Bearer k"}).json()["data"]
    assert "b64_json" not in image
    fetched = httpx.URL(image["url"])
    assert fetched.host == "bagel.test"
    file = client.get(fetched.path)
    assert (file.status_code, file.headers["content-type"]) == (200, "image/png")
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(file.content))), PIXELS)
    gone = client.get(f"{images.FILES}guessed.png")
    assert (gone.status_code, gone.json()["error"]["code"]) == (404, "not_found")


def test_stored_images_are_bounded_in_time_and_memory() -> None:
    store = ImageStore(max_bytes=250, ttl_s=1000)
    names = [store.add(bytes(100), "png") for _ in range(3)]
    assert [store.get(name) is not None for name in names] == [False, True, True]
    assert store.stored_bytes == 200
    expired = ImageStore(max_bytes=250, ttl_s=0)
    assert expired.get(expired.add(b"x", "png")) is None
    assert expired.stored_bytes == 0


PNG_FILE = ("cat.png", b"an image", "image/png")


@pytest.mark.parametrize("several", [False, True])
def test_an_edit_sends_its_files_and_fields(several: bool) -> None:
    backend = FakeClient(*PROGRESS, IMAGE, EDITED)
    with official(backend) as client:
        reply = client.images.edit(
            image=[("a.png", b"first"), ("b.png", b"second")] if several else PNG_FILE,
            prompt="Make it snow",
            n=1,
            size="48x32",
            input_fidelity="high",
            output_format="webp",
            output_compression=80,
            stream=False,
            extra_body={
                "seed": 7,
                "cfg_img_scale": 2.5,
                "think": False,
                "cfg_interval": [0.0, 1.0],
                "negative_prompt": "42",
            },
        )
    sent = (b"first", b"second") if several else (b"an image",)
    assert backend.requests == [
        with_images(
            request_of(
                "Make it snow",
                len(sent),
                n=1,
                width=48,
                height=32,
                seed=7,
                cfg_img_scale=2.5,
                think=False,
                cfg_interval=(0.0, 1.0),
                negative_prompt="42",
            ),
            sent,
        )
    ]
    assert decoded((reply.data or [])[0].b64_json).format == "WEBP"
    assert reply.usage is not None
    assert (reply.usage.input_tokens_details.image_tokens, reply.usage.input_tokens_details.text_tokens) == (100, 5)


def with_images(request: GenerationRequest, images: tuple[bytes, ...]) -> GenerationRequest:
    return msgspec.structs.replace(request, image=images)


URL = "data:image/png;base64," + base64.b64encode(b"an image").decode()


@pytest.mark.parametrize(
    "given",
    [
        {"image": URL},
        {"image": [URL]},
        {"images": [{"image_url": URL}]},
        {"images": [{"image_url": URL, "file_id": None}]},
        {"image": {"url": URL}},
        {"image": [{"type": "image_url", "image_url": {"url": URL}}]},
        {"image": [{"type": "input_image", "image_url": URL}]},
    ],
)
def test_an_edit_may_be_json(given: dict[str, Any]) -> None:
    backend = FakeClient(*PROGRESS, IMAGE, EDITED)
    reply = api(backend).post(EDITS, json={"prompt": "Make it snow", **given})
    assert reply.status_code == 200, reply.text
    assert backend.requests == [with_images(request_of("Make it snow", 1), (b"an image",))]


def test_an_image_in_a_form_may_be_a_url() -> None:
    backend = FakeClient(*PROGRESS, IMAGE, EDITED)
    form = [
        ("prompt", (None, "Make it snow")),
        ("image[]", (None, URL)),
        ("image[]", PNG_FILE),
        ("image[]", (None, "")),
    ]
    assert api(backend).post(EDITS, files=form).status_code == 200
    assert backend.requests[0].image == (b"an image", b"an image")


@pytest.mark.parametrize("edit", [False, True])
def test_previews_then_the_image_are_streamed(edit: bool) -> None:
    backend = FakeClient(PROGRESS[0], PREVIEWS[0], PROGRESS[1], PREVIEWS[1], PROGRESS[2], IMAGE, EDITED)
    with official(backend) as client:
        if edit:
            events: list[Any] = list(
                client.images.edit(image=PNG_FILE, prompt="Make it snow", stream=True, partial_images=2)
            )
        else:
            events = list(client.images.generate(prompt="A cute cat", stream=True, partial_images=2))
    name = "image_edit" if edit else "image_generation"
    assert [event.type for event in events] == [f"{name}.partial_image"] * 2 + [f"{name}.completed"]
    assert [event.partial_image_index for event in events[:2]] == [0, 1]
    np.testing.assert_array_equal(np.asarray(decoded(events[1].b64_json)), PIXELS + np.uint8(1))
    np.testing.assert_array_equal(np.asarray(decoded(events[2].b64_json)), PIXELS)
    assert {(event.size, event.output_format, event.background) for event in events} == {("48x32", "png", "opaque")}
    assert events[2].usage.total_tokens == 111
    assert backend.requests[0].partial_images == 2


def test_the_usage_of_several_streamed_images_adds_up() -> None:
    with official(FakeClient(*THOUGHT_IMAGES)) as client:
        events: list[Any] = list(client.images.generate(prompt="A cute cat", n=2, stream=True))
    assert [(event.index, event.seed) for event in events] == [(0, 7), (1, 8)]
    assert sum(event.usage.total_tokens for event in events) == 21
    assert events[0].revised_prompt == "A cat, in snow."


def test_progress_is_a_comment_that_no_client_takes_for_an_event() -> None:
    text = api(FakeClient()).post(GENERATIONS, json={"prompt": "x", "stream": True}).text
    assert text.startswith(": dit 1/3\n\n: dit 2/3\n\n")


def test_an_error_in_the_stream_is_raised_by_the_client() -> None:
    with (
        official(FakeClient(*PREVIEWS, errors.StageUnavailable("dit died"))) as client,
        pytest.raises(openai.APIError, match="dit died"),
    ):
        list(client.images.generate(prompt="x", stream=True, partial_images=2))


def test_an_error_before_the_stream_has_its_status() -> None:
    with (
        official(FakeClient(errors.InvalidRequest("width=47 is not allowed; allowed: ...", "width"))) as client,
        pytest.raises(openai.BadRequestError) as caught,
    ):
        client.images.generate(prompt="x", size="47x32", stream=True)  # type: ignore[call-overload]
    assert caught.value.param == "size"


@pytest.mark.parametrize(
    ("fields", "param", "advice"),
    [
        ({"prompt": None}, "prompt", "prompt is required"),
        ({"size": "huge"}, "size", "'auto', '1K' or 'WIDTHxHEIGHT'"),
        ({"size": "64x64", "width": 32}, "size", "width and size are both given, with the values 32 and 64"),
        ({"output_format": "gif"}, "output_format", "'png', 'jpeg' or 'webp'"),
        ({"output_compression": 101}, "output_compression", "at most 100"),
        ({"background": "transparent"}, "background", "'auto' or 'opaque'"),
        ({"stream": True, "response_format": "url"}, "response_format", "b64_json with stream=true"),
        ({"mask": URL}, "mask", "say in the prompt what to change"),
        ({"svg": {"model": "x"}}, "svg", "images are still"),
        ({"sized": "64x64"}, "sized", "did you mean size?"),
        ({"image": URL}, "image", "POST /v1/images/edits takes images"),
        ({"reference_images": [URL]}, "reference_images", "POST /v1/images/edits takes images, in image"),
        ({"sampler_name": "Euler a"}, "sampler_name", "there is one solver"),
        ({"n_iter": 4}, "n_iter", "use n"),
        ({"denoising_strength": 0.5}, "denoising_strength", "how much to change"),
        ({"enable_hr": True}, "enable_hr", "allowed: false; use size"),
        ({"guidance": 4}, "guidance", "use guidance_scale"),
        ({"aspect_ratio": "wide"}, "aspect_ratio", "'W:H', such as '16:9'"),
        ({"image_size": "2K"}, "image_size", "'auto', '1K' or 'WIDTHxHEIGHT'"),
        ({"image_size": 512}, "image_size", "allowed: a text, or an object with width and height"),
        ({"image_size": {"width": 512}}, "image_size.height", "image_size.height is required"),
        ({"image_config": {"image_size": {"width": "5"}}}, "image_config.image_size.width", "an integer"),
        ({"n": "2"}, "n", "an integer"),
    ],
)
def test_what_a_generation_cannot_have_is_refused_by_name(fields: dict[str, Any], param: str, advice: str) -> None:
    backend = FakeClient()
    reply = api(backend).post(GENERATIONS, json={"prompt": "x", **fields})
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert error["param"] == param
    assert advice in error["message"]
    assert backend.requests == []


def test_a_form_may_have_fields_without_effect_and_nulls() -> None:
    backend = FakeClient(*PROGRESS, IMAGE, EDITED)
    texts = {"user": "u", "user[]": "v", "skip_special_tokens": "true", "best_of": "1", "tools": "null", "seed": ""}
    texts |= {"output_format": "null", "quality": "", "size": "null", "cache": "null", "no_such_field": "null"}
    form = [("prompt", (None, "x")), ("image", PNG_FILE), *((name, (None, text)) for name, text in texts.items())]
    reply = api(backend).post(EDITS, files=form)
    assert reply.status_code == 200, reply.text
    assert backend.requests == [with_images(request_of("x", 1), (b"an image",))]


SIDES = ({"image_size[width]": "64", "image_size[height]": "32"}, {"image_size": '{"width": 64, "height": 32}'})


@pytest.mark.parametrize("sides", SIDES, ids=["by its members", "as JSON"])
def test_an_object_in_a_form(sides: dict[str, str]) -> None:
    backend = FakeClient(*PROGRESS, IMAGE, EDITED)
    members = {"chat_template_kwargs[enable_thinking]": "true", "thinking[budget_tokens]": "7", "image[0]": URL}
    members |= sides | {"do_sample": "false"}
    form = [("prompt", (None, "x")), *((name, (None, text)) for name, text in members.items())]
    reply = api(backend).post(EDITS, files=form)
    assert reply.status_code == 200, reply.text
    found = backend.requests[0]
    assert (found.think, found.max_think_tokens, found.temperature) == (True, 7, 0)
    assert (found.width, found.height) == (64, 32)


def test_what_an_edit_cannot_have_is_refused_by_name() -> None:
    prompt = ("prompt", (None, "x"))
    for form, param, advice in (
        ([prompt, ("image", PNG_FILE), ("mask", PNG_FILE)], "mask", "say in the prompt what to change"),
        ([prompt], "image", "POST /v1/images/generations draws without one"),
        ([prompt, *[("image[]", PNG_FILE)] * 11], "image", "at most 10"),
        ([prompt, ("image", PNG_FILE), ("n", (None, "two"))], "n", "an integer"),
        ([prompt, ("image", PNG_FILE), ("n", (None, "1")), ("n", (None, "2"))], "n", "allowed: once"),
        ([prompt, ("image", PNG_FILE), ("picture", PNG_FILE)], "picture", "allowed as files: image"),
        ([("image", PNG_FILE)], "prompt", "prompt is required"),
        ([prompt, ("image", (None, b"\x89PNG"))], "image", "allowed: a text, or a file with a filename"),
        ([("image", PNG_FILE), ("prompt", (None, b"caf\xe9"))], "prompt", "prompt is not text in UTF-8"),
        ([prompt, ("image", PNG_FILE), ("size[x]", (None, "1"))], "size[x]", "is not a known field"),
        (
            [prompt, ("image", PNG_FILE), ("thinking", (None, "{}")), ("thinking[type]", (None, "enabled"))],
            "thinking",
            "by its members",
        ),
    ):
        reply = api(FakeClient()).post(EDITS, files=form)
        assert reply.status_code == 400, form
        assert reply.json()["error"]["param"] == param
        assert advice in reply.json()["error"]["message"]
    cut = b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\nA ca'
    for content, problem in (
        (b"--y", "Invalid multipart data"),
        (cut, "it ends before its last boundary"),
    ):
        headers = {"content-type": "multipart/form-data; boundary=x"}
        broken = api(FakeClient()).post(EDITS, content=content, headers=headers)
        assert broken.status_code == 400
        assert f"the body is not a form: {problem}" in broken.json()["error"]["message"]
    both = api(FakeClient()).post(EDITS, json={"prompt": "x", "image": URL, "images": [URL]})
    assert both.json()["error"]["param"] == "images"
    kept = api(FakeClient()).post(EDITS, json={"prompt": "x", "images": [{"file_id": "f"}]}).json()["error"]
    allowed = 'allowed: {"image_url": URL}, as this server keeps no files'
    assert kept["message"] == f'images[0]={{"file_id": "f"}} is not allowed; {allowed}'


def test_a_form_over_the_limit_is_refused() -> None:
    large = ("a.png", bytes(SETTINGS.max_body_bytes), "image/png")
    reply = api(FakeClient()).post(EDITS, files=[("prompt", (None, "x")), ("image", large)])
    assert reply.status_code == 413


def test_it_sends_the_model_the_same_request_as_chat() -> None:
    backend = FakeClient()
    client = api(backend)
    client.post(GENERATIONS, json={"prompt": "A cute cat", "seed": 7})
    message = {"role": "user", "content": "A cute cat"}
    client.post("/v1/chat/completions", content=json.dumps({"messages": [message], "modalities": ["image"], "seed": 7}))
    assert backend.requests[0] == backend.requests[1]


@pytest.mark.parametrize(
    ("place", "path", "body"),
    [("images", GENERATIONS, {"prompt": "A cute cat"}), ("responses", "/v1/responses", {"input": "A cute cat"})],
)
def test_a_field_without_effect_is_accepted_where_it_requests_nothing(
    place: str, path: str, body: dict[str, Any]
) -> None:
    backend = FakeClient(*(ONE_ANSWER if place == "responses" else ()))
    client = api(backend)
    harmless = {name: {"any": ["value"]} for name in IGNORED[place]}
    harmless |= {name: noop.values[0] for name, noop in NOOP[place].items() if noop.values}
    own = ImagesBody if place == "images" else ResponsesBody
    harmless = {name: value for name, value in harmless.items() if name not in own.model_fields}
    harmless |= dict.fromkeys(choosing_fields(own), "")
    assert client.post(path, json=body).status_code == 200
    reply = client.post(path, json={**body, **harmless})
    assert reply.status_code == 200, reply.text
    assert backend.requests[0] == backend.requests[1]
    for name in harmless.keys() & NOOP[place].keys():
        assert client.post(path, json={**body, name: ["other"]}).status_code == 400, name
