"""Conversations, their images and what is wanted of them, as the model is asked."""

from __future__ import annotations

import pytest
from proxy_fake import PNG_URL, assert_refused, chat_body, generation, image_part, user_turn

from bagel_triton.openai.noop_fields import IGNORED, NOOP
from bagel_triton.protocol.errors import InvalidRequest
from bagel_triton.protocol.request import ImageRef, TextPart, Turn


def message(role: str = "user", content: object = "x", **more: object) -> dict[str, object]:
    return {"role": role, "content": content, **more}


def images(*urls: str) -> list[dict[str, object]]:
    """The messages of a conversation that shows the images at ``urls``."""
    return [message(content=[{"type": "text", "text": "x"}, *map(image_part, urls)])]


@pytest.mark.parametrize(
    ("modalities", "modality", "think"),
    [
        (None, "text", None),
        (["text"], "text", None),
        (["image"], "image", None),
        (["text", "image"], "image", None),
        (["image", "text"], "image", None),
    ],
)
def test_modalities_say_what_is_wanted(modalities: list[str] | None, modality: str, think: bool | None) -> None:
    request = generation(chat_body(modalities=modalities))
    assert (request.modality, request.think) == (modality, think)


def test_thinking_may_be_asked_for_twice() -> None:
    assert generation(chat_body(modalities=["text", "image"], think=True)).think is True
    assert generation(chat_body(modalities=["image"], think=False)).think is False


def test_a_conversation_keeps_its_order_and_its_images() -> None:
    first, second, third = (f"data:image/png;base64,{data}" for data in ("QQ==", "Qg==", "Qw=="))
    body = chat_body(
        messages=[
            message("developer", "Be brief."),
            message(content=[image_part(first), {"type": "text", "text": "What"}, {"type": "text", "text": "is it?"}]),
            message("assistant", [{"type": "text", "text": "This:"}, image_part(second)]),
            message("system", [{"type": "text", "text": "Be kind."}]),
            message(content=[{"type": "text", "text": "And"}, image_part(third), {"type": "text", "text": "this?"}]),
        ]
    )
    request = generation(body)
    assert request.image == (b"A", b"B", b"C")
    assert request.messages == (
        Turn("system", (TextPart("Be brief."),)),
        Turn("user", (ImageRef(0), TextPart("What"), TextPart("is it?"))),
        Turn("assistant", (TextPart("This:"), ImageRef(1))),
        Turn("system", (TextPart("Be kind."),)),
        Turn("user", (TextPart("And"), ImageRef(2), TextPart("this?"))),
    )


def test_a_reply_can_be_sent_back_as_it_came() -> None:
    reply = {"role": "assistant", "content": [{**image_part(PNG_URL), "seed": 7}], "reasoning_content": "A cat."}
    request = generation(chat_body(messages=[message(), reply, message(content="Again")]))
    assert request.messages == (user_turn("x"), Turn("assistant", (ImageRef(0),)), user_turn("Again"))
    assert request.image == (b"an image",)


def test_ten_images_are_served() -> None:
    request = generation(chat_body(messages=images(*[PNG_URL] * 10)))
    assert request.image == (b"an image",) * 10


@pytest.mark.parametrize(
    "url",
    [
        "data:;base64,QUI=",
        "data:image/png;name=x.png;base64,QUI=",
        "DATA:image/png;BASE64,QUI=",
        "data:image/png;base64,QUI%3D",
        "data:image/png;base64,QU\nI=\n",
        "data:image/png; base64, QUI",
    ],
)
def test_a_data_url_may_be_written_in_any_valid_way(url: str) -> None:
    assert generation(chat_body(messages=images(url))).image == (b"AB",)


@pytest.mark.parametrize("place", ["body", "message", "part", "image_url", "stream_options"])
def test_a_field_without_effect_is_accepted_where_it_requests_nothing(place: str) -> None:
    """Every row of the tables: ignored fields with any value, the others with the values they allow."""
    for name in IGNORED[place]:
        assert generation(placed(place, name, {"any": ["value"]})) == generation(placed(place, name, None))
    for name, noop in NOOP[place].items():
        for value in noop.values:
            assert generation(placed(place, name, value)) == generation(placed(place, name, None))
        with pytest.raises(InvalidRequest, match=rf"{name}=\['other'\]|{name}=\[\"other\"\] is not supported; "):
            generation(placed(place, name, ["other"]))


def placed(place: str, name: str, value: object) -> dict[str, object]:
    """A body in which the object called ``place`` has a member ``name``."""
    field = {name: value}
    if place == "body":
        return chat_body(**field)
    if place == "stream_options":
        return chat_body(stream=True, stream_options=field)
    if place == "message":
        return chat_body(messages=[message(**field)])
    part = {**image_part(PNG_URL), **field} if place == "part" else image_part(PNG_URL)
    if place == "image_url":
        part["image_url"] |= field  # type: ignore[operator]
    return chat_body(messages=[message(content=[part])])


def test_images_that_a_reply_has_twice_are_shown_once() -> None:
    first, second = (f"data:image/png;base64,{data}" for data in ("QQ==", "Qg=="))
    both = message("assistant", [image_part(first)], images=[image_part(first) | {"index": 0}])
    apart = message("assistant", "", images=[image_part(second)])
    request = generation(chat_body(messages=[message(), both, apart, message()]))
    assert request.image == (b"A", b"B")


IMAGE_URL = "messages[0].content[1].image_url"


BAD: list[tuple[dict[str, object], str | None, str]] = [
    # modalities
    ({"modalities": "image"}, "modalities", "modalities='image' is not allowed; allowed: a list"),
    (
        {"modalities": ["sound"]},
        "modalities",
        'modalities=["sound"] is not allowed; allowed: ["text"], ["image"], ["image", "text"]',
    ),
    ({"modalities": ["video"]}, "modalities", 'modalities=["video"] is not allowed; allowed: ["text"], '),
    ({"modalities": ["text", "audio"]}, "modalities", 'modalities=["text", "audio"] is not allowed'),
    ({"modalities": [1]}, "modalities[0]", "modalities[0]=1 is not allowed; allowed: a text"),
    # what the model cannot do
    ({"presence_penalty": False}, "presence_penalty", "presence_penalty=false is not allowed; allowed: a number"),
    ({"logprobs": 5}, "logprobs", "logprobs=5 is not allowed; allowed: true or false"),
    ({"think": True, "reasoning_effort": "none"}, "reasoning_effort", "think and reasoning_effort are both given"),
    (
        {"response_format": {"type": "json_object"}},
        "response_format",
        'response_format={"type": "json_object"} is not supported; allowed: {"type": "text"} or {}; ask for it',
    ),
    (
        {"tools": [{"type": "function"}]},
        "tools",
        'tools=[{"type": "function"}] is not supported; allowed: []; this model',
    ),
    (
        {"reasoning_format": "none"},
        "reasoning_format",
        "reasoning_format='none' is not supported; allowed: 'auto' or 'parsed' or 'deepseek'; thinking is in",
    ),
    # messages
    ({"messages": []}, "messages", "messages=[] is not allowed; allowed: at least 1 elements"),
    ({"messages": [message()] * 3000}, "messages", "is not allowed; allowed: at most 2048 elements"),
    ({"messages": [message(content=[{"type": "text", "text": "x"}] * 3000)]}, "messages[0].content", "at most 2048"),
    ({"messages": "A cat"}, "messages", "messages='A cat' is not allowed; allowed: a list"),
    ({"messages": ["A cat"]}, "messages[0]", "messages[0]='A cat' is not allowed; allowed: an object"),
    ({"messages": [message("tool")]}, "messages[0].role", "'user', 'system', 'assistant' or 'developer'"),
    ({"messages": [message(size=1)]}, "messages[0].size", "is not a known field; allowed: content, images, role"),
    ({"messages": [message(content=5)]}, "messages[0].content", "allowed: a text or a list of parts"),
    ({"messages": [message(content=[5])]}, "messages[0].content[0]", "allowed: an object"),
    ({"messages": [message(content=[{"text": "x"}])]}, "messages[0].content[0].type", "is required"),
    (
        {"messages": [message(content=[{"type": "text", "text": "x"}, {"type": "audio"}])]},
        "messages[0].content[1].type",
        "messages[0].content[1].type='audio' is not allowed; allowed: 'text', 'image_url'",
    ),
    ({"messages": [message(content=[{"type": "text"}])]}, "messages[0].content[0].text", "is required"),
    (
        {"messages": [message(content=[{"type": "text", "text": 5}])]},
        "messages[0].content[0].text",
        "messages[0].content[0].text=5 is not allowed; allowed: a text",
    ),
    (
        {"messages": [message(content=[{"type": "text", "text": "x", "size": 1}])]},
        "messages[0].content[0].size",
        "is not a known field; allowed: text, type",
    ),
    (
        {"messages": [message("developer", [image_part(PNG_URL)]), message()]},
        "messages[0].content[0].type",
        "='image_url' is not allowed; allowed: 'text' in a message of role 'developer'",
    ),
    # images
    ({"messages": images(*[PNG_URL] * 11)}, "messages", "messages='11 images' is not allowed; allowed: at most 10"),
    ({"messages": images(PNG_URL[:-3])}, IMAGE_URL, f"{IMAGE_URL}={PNG_URL[:-3]!r} holds malformed base64: "),
    ({"messages": images("data:image/png;base64,QUJDQU JDRA==")}, IMAGE_URL, "holds malformed base64: "),
    ({"messages": images("data:image/png;base64,QU+-")}, IMAGE_URL, "both the standard and the URL-safe alphabet"),
    ({"messages": images("data:image/png;base64,QQ===")}, IMAGE_URL, "wrong padding"),
    ({"messages": images("data:image/png;base64,a*b=")}, IMAGE_URL, "holds malformed base64: "),
    ({"messages": images("data:image/png;base64,")}, IMAGE_URL, "holds no data"),
    ({"messages": images("data:image/png;base64")}, IMAGE_URL, "allowed: data:<media type>;base64,<data>"),
    ({"messages": images("data:image/svg+xml,<svg/>")}, IMAGE_URL, "allowed: data:<media type>;base64,<data>"),
    ({"messages": images("")}, IMAGE_URL, "='' is not allowed; allowed: a data: URL"),
    ({"messages": images("/etc/passwd")}, IMAGE_URL, "='/etc/passwd' is not allowed; allowed: a data: URL"),
    ({"messages": images("file:///etc/passwd")}, IMAGE_URL, "='file:///etc/passwd' is not allowed"),
    ({"messages": images("ftp://host/cat.png")}, IMAGE_URL, "='ftp://host/cat.png' is not allowed"),
    ({"messages": images("https://host/cat.png")}, IMAGE_URL, "remote image, and this server fetches none"),
    ({"messages": images(PNG_URL, "C:\\cat.png")}, "messages[0].content[2].image_url", "is not allowed"),
]


@pytest.mark.parametrize(("fields", "param", "text"), BAD, ids=[f"{param}: {text[:40]}" for _, param, text in BAD])
def test_a_bad_body_is_refused_by_field_value_and_what_is_allowed(
    fields: dict[str, object], param: str, text: str
) -> None:
    assert_refused(fields, param, text)
