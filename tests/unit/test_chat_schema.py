from __future__ import annotations

from typing import Any

import pytest
from proxy_fake import A_CAT, assert_refused, chat_body, generation, image_part

from bagel_triton.openai.chat_schema import parse
from bagel_triton.protocol.errors import InvalidRequest
from bagel_triton.protocol.request import GenerationRequest

EVERY_FIELD: dict[str, Any] = {
    "negative_prompt": "blurry",
    "lora": "style",
    "height": 768,
    "width": 512,
    "aspect_ratio": "2:3",
    "num_inference_steps": 25,
    "seed": 2**40,
    "n": 3,
    "cfg_text_scale": 4,
    "cfg_img_scale": 1.5,
    "cfg_interval": [0, 1.0],
    "cfg_renorm_type": "channel",
    "cfg_renorm_min": 0.25,
    "timestep_shift": 3.0,
    "cache": "taylorseer",
    "think": True,
    "max_think_tokens": 100,
    "max_tokens": 200,
    "temperature": 0.7,
    "top_p": 0.9,
    "top_k": 40,
    "min_p": 0.05,
    "repetition_penalty": 1.1,
    "frequency_penalty": 0.5,
    "presence_penalty": -1,
    "logit_bias": {"5": -100},
    "top_logprobs": 2,
    "ignore_eos": True,
    "min_tokens": 5,
    "partial_images": 3,
    "stop": ["\n", "END"],
    "priority": -1,
    "timeout": 30.5,
}
CONVERSATION = {"prompt", "image", "messages", "modality"}


def test_every_field_reaches_the_request_from_top_level_and_from_extra_body() -> None:
    values = {**EVERY_FIELD, "cfg_interval": (0.0, 1.0), "stop": ("\n", "END"), "logit_bias": {5: -100}}
    expected = GenerationRequest(messages=A_CAT, modality="image", **values)
    assert generation(chat_body(stream=True, logprobs=True, **EVERY_FIELD)) == expected
    assert generation(chat_body(stream=True, logprobs=True, extra_body=EVERY_FIELD)) == expected
    assert set(EVERY_FIELD) == set(GenerationRequest.__struct_fields__) - CONVERSATION


def test_fields_may_be_split_between_top_level_and_extra_body() -> None:
    request = generation(chat_body(height=64, extra_body={"width": 32}))
    assert (request.height, request.width) == (64, 32)


def test_a_field_that_is_not_given_or_null_is_left_to_its_default() -> None:
    nulls = dict.fromkeys([*EVERY_FIELD, "model", "stream", "stream_options", "extra_body", "max_completion_tokens"])
    plain = GenerationRequest(messages=A_CAT, modality="image")
    assert generation(chat_body(**nulls)) == generation(chat_body(stop=[])) == generation(chat_body()) == plain
    assert generation(chat_body(seed=None, extra_body={"seed": 5})).seed == 5


def test_other_ways_to_write_a_field() -> None:
    assert generation(chat_body(max_completion_tokens=9)).max_tokens == 9
    assert generation(chat_body(extra_body={"max_completion_tokens": 9})).max_tokens == 9
    request = generation(chat_body(guidance_scale=3, true_cfg_scale=2, steps=5.0, size="64x32"))
    assert (request.cfg_text_scale, request.cfg_img_scale, request.num_inference_steps) == (3, 2, 5)
    assert (request.width, request.height) == (64, 32)
    assert generation(chat_body(extra_body={"size": "auto"}, height=64)).height == 64
    assert generation(chat_body(logprobs=True)).top_logprobs == 0
    square = generation(chat_body(image_config={"image_size": "1K"}))
    assert (square.width, square.height, square.aspect_ratio) == (1024, 1024, None)
    tall = generation(chat_body(image_config={"aspect_ratio": "9:16", "image_size": "1k"}))
    assert (tall.width, tall.height, tall.aspect_ratio) == (None, 1024, "9:16")
    assert generation(chat_body(top_logprobs=3)).top_logprobs is None
    assert generation(chat_body(stop="END")).stop == ("END",)


@pytest.mark.parametrize(
    ("fields", "temperature"),
    [
        ({"do_sample": False}, 0),
        ({"do_sample": False, "temperature": 0}, 0),
        ({"do_sample": False, "top_p": 0.9}, 0),
        ({"do_sample": True}, 1),
        ({"do_sample": True, "text_temperature": 0.3}, 0.3),
        ({"extra_args": {"do_sample": True, "text_temperature": 0.3}}, 0.3),
        ({"temperature": 0.3, "extra_body": {"extra_args": {"do_sample": True}}}, 0.3),
    ],
)
def test_whether_to_sample_may_be_given_by_name(fields: dict[str, Any], temperature: float) -> None:
    assert generation(chat_body(**fields)).temperature == temperature


SPOKEN = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "It is"}]


@pytest.mark.parametrize(
    ("fields", "ended"),
    [
        ({}, False),
        ({"continue_final_message": True, "add_generation_prompt": False}, False),
        ({"add_generation_prompt": False}, False),
        ({"continue_final_message": False}, True),
        ({"continue_final_message": False, "add_generation_prompt": True}, True),
        ({"chat_template_kwargs": {"add_generation_prompt": True}}, True),
        ({"chat_template_kwargs": {"continue_final_message": True}}, False),
        ({"extra_body": {"add_generation_prompt": True}}, True),
    ],
)
def test_a_last_message_of_the_assistant_is_continued_or_followed(fields: dict[str, Any], ended: bool) -> None:
    last = generation({"messages": SPOKEN, **fields}).messages[-1]  # type: ignore[index]
    assert last.ended is ended
    drawn = {"messages": SPOKEN, "modalities": ["image"]}
    assert generation(drawn | fields) == generation(drawn)
    assert generation({"messages": SPOKEN[:1], **fields}) == generation({"messages": SPOKEN[:1]})


def test_ranges_are_left_to_the_stage_that_owns_them() -> None:
    assert generation(chat_body(height=7, num_inference_steps=-1)).num_inference_steps == -1


BAD: list[tuple[dict[str, object], str | None, str]] = [
    # types
    ({"height": "512"}, "height", "height='512' is not allowed; allowed: an integer"),
    ({"height": 512.5}, "height", "height=512.5 is not allowed; allowed: an integer"),
    ({"height": True}, "height", "height=true is not allowed; allowed: an integer"),
    ({"cfg_text_scale": "4"}, "cfg_text_scale", "cfg_text_scale='4' is not allowed; allowed: a number"),
    ({"cfg_text_scale": True}, "cfg_text_scale", "cfg_text_scale=true is not allowed; allowed: a number"),
    ({"cfg_text_scale": float("nan")}, "cfg_text_scale", "cfg_text_scale=NaN is not allowed; allowed: a finite number"),
    ({"cfg_text_scale": float("inf")}, "cfg_text_scale", "cfg_text_scale=Infinity is not allowed; allowed: a finite "),
    ({"negative_prompt": 5}, "negative_prompt", "negative_prompt=5 is not allowed; allowed: a text"),
    ({"cfg_interval": 1}, "cfg_interval", "cfg_interval=1 is not allowed; allowed: a list"),
    ({"cfg_interval": [1]}, "cfg_interval", "cfg_interval=[1] is not allowed; allowed: at least 2 elements"),
    ({"cfg_interval": []}, "cfg_interval", "cfg_interval=[] is not allowed; allowed: at least 1 elements"),
    ({"cfg_interval": [0, 1, 2]}, "cfg_interval", "allowed: at most 2 elements"),
    ({"cfg_interval": [0, None]}, "cfg_interval[1]", "cfg_interval[1]=null is not allowed; allowed: a number"),
    ({"stream": "yes"}, "stream", "stream='yes' is not allowed; allowed: true or false"),
    ({"stream_options": []}, "stream_options", "stream_options=[] is not allowed; allowed: an object"),
    ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage", "allowed: true or false"),
    ({"n": 1.5}, "n", "n=1.5 is not allowed; allowed: an integer"),
    ({"max_tokens": "5"}, "max_tokens", "max_tokens='5' is not allowed; allowed: an integer"),
    ({"max_completion_tokens": True}, "max_completion_tokens", "=true is not allowed; allowed: an integer"),
    ({"max_think_tokens": 1.5}, "max_think_tokens", "allowed: an integer"),
    ({"temperature": "0.5"}, "temperature", "temperature='0.5' is not allowed; allowed: a number"),
    ({"temperature": float("nan")}, "temperature", "temperature=NaN is not allowed; allowed: a finite number"),
    ({"top_p": float("-inf")}, "top_p", "top_p=-Infinity is not allowed; allowed: a finite number"),
    ({"top_k": 1.5}, "top_k", "top_k=1.5 is not allowed; allowed: an integer"),
    ({"repetition_penalty": [1]}, "repetition_penalty", "allowed: a number"),
    ({"cfg_interval": [0, float("nan")]}, "cfg_interval[1]", "cfg_interval[1]=NaN is not allowed"),
    ({"think": "yes"}, "think", "think='yes' is not allowed; allowed: true or false"),
    ({"cache": True}, "cache", "cache=true is not allowed; allowed: a text"),
    ({"stop": 5}, "stop", "stop=5 is not allowed; allowed: a text or a list of texts"),
    ({"stop": ["a", 5]}, "stop[1]", "stop[1]=5 is not allowed; allowed: a text"),
    # fields
    ({"colour": 4}, "colour", "colour is not a known field; allowed: add_generation_prompt, aspect_ratio, cache, "),
    (
        {"extra_body": {"stepping": 4}},
        "extra_body.stepping",
        "num_outputs_per_prompt, partial_images, presence_penalty",
    ),
    ({"extra_body": {"messages": []}}, "extra_body.messages", "is not a known field"),
    ({"extra_body": {"extra_body": {}}}, "extra_body.extra_body", "is not a known field"),
    (
        {"extra_body": {"size": "big"}},
        "extra_body.size",
        "extra_body.size='big' is not allowed; allowed: 'auto', '1K' or ",
    ),
    (
        {"size": "64x64", "height": 32},
        "size",
        "height and size are both given, with the values 32 and 64; allowed: one",
    ),
    ({"steps": 4, "num_inference_steps": 5}, "steps", "num_inference_steps and steps are both given"),
    ({"logit_bias": {"x": 1}}, "logit_bias", "allowed: an object of at most 1024 token ids"),
    ({"extra_body": {"height": "5"}}, "extra_body.height", "extra_body.height='5' is not allowed; allowed: an integer"),
    ({"stream_options": {"usage": True}}, "stream_options.usage", "allowed: include_progress, include_usage"),
    ({"seed": 1, "extra_body": {"seed": 2}}, "extra_body.seed", "seed and extra_body.seed are both given"),
    (
        {"max_tokens": 2, "max_completion_tokens": 1},
        "max_completion_tokens",
        "max_tokens and max_completion_tokens are both given, with the values 2 and 1; allowed: one of them",
    ),
    ({"max_tokens": 2, "extra_body": {"max_completion_tokens": 1}}, "extra_body.max_completion_tokens", "both given"),
    (
        {"heigth": 64},
        "heigth",
        "heigth is not a known field; did you mean height? allowed: add_generation_prompt, aspect_ratio, cache, ",
    ),
    ({"extra_body": {"Seed": 4}}, "extra_body.Seed", "is not a known field; did you mean seed? allowed: "),
    ({"logit_bias": {"5": 1, "05": 2}}, "logit_bias", "is not allowed; allowed: each token once"),
    (
        {"messages": SPOKEN, "modalities": ["text"], "continue_final_message": True, "add_generation_prompt": True},
        "add_generation_prompt",
        "continue_final_message=true and add_generation_prompt=true contradict each other; allowed: one of them",
    ),
    (
        {
            "messages": SPOKEN,
            "modalities": None,
            "add_generation_prompt": False,
            "extra_body": {"continue_final_message": False},
        },
        "add_generation_prompt",
        "extra_body.continue_final_message=false and add_generation_prompt=false contradict each other",
    ),
    (
        {"do_sample": False, "temperature": 0.5},
        "do_sample",
        "=false is not allowed; allowed: true beside temperature=0.5",
    ),
    (
        {"text_temperature": 0, "extra_args": {"do_sample": True}},
        "extra_args.do_sample",
        "extra_args.do_sample=true is not allowed; allowed: false beside text_temperature=0",
    ),
    ({"top_p": 0, "do_sample": True}, "do_sample", "allowed: false beside top_p=0"),
    ({"temperature": 1, "text_temperature": 0.5}, "text_temperature", "both given, with the values 1"),
    ({"extra_args": 5}, "extra_args", "extra_args=5 is not allowed; allowed: an object"),
    ({"extra_args": {"extra_body": {"n": 1}}}, "extra_args.extra_body", "is not a known field"),
    ({"prompt": "x"}, "prompt", "prompt is not a known field; allowed: "),
    ({"image": "x"}, "image", "image is not a known field"),
]


@pytest.mark.parametrize(("fields", "param", "text"), BAD, ids=[f"{param}: {text[:40]}" for _, param, text in BAD])
def test_a_bad_body_is_refused_by_field_value_and_what_is_allowed(
    fields: dict[str, object], param: str, text: str
) -> None:
    assert_refused(fields, param, text)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "the body is not JSON: Expecting value"),
        (b'{"messages"', "the body is not JSON: Expecting ':'"),
        (b'{"messages": "\xff"}', "the body is not JSON: "),
        (b"[]", "body=[] is not allowed; allowed: a JSON object"),
        (b'"text"', "body='text' is not allowed; allowed: a JSON object"),
        (b"{}", "messages is required"),
        (b'{"messages": ' + b"[" * 100_000, "the body is not JSON: it is nested too deeply"),
        (
            b'{"messages": [{"role": "user", "content": "a\\ud800"}]}',
            "messages[0].content='a\\ud800' is not allowed; allowed",
        ),
        (b'{"metadata": {"\\udfff": 1}}', "metadata.\udfff is no name of a field; allowed: whole Unicode characters"),
        (b'{"messages": [{"role": "user", "content": "x"}], "n": NaN}', "n=NaN is not allowed; allowed: "),
    ],
)
def test_what_is_not_a_json_object_is_refused(data: bytes, text: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse(data)
    assert text in caught.value.message


USER = '"messages": [{"role": "user", "content": "x"}]'


def test_one_value_under_two_names_is_that_value() -> None:
    alike = {"steps": 4, "num_inference_steps": 4, "size": "64x32", "width": 64, "seed": 1, "extra_body": {"seed": 1}}
    request = generation(chat_body(**alike))
    assert (request.num_inference_steps, request.width, request.height, request.seed) == (4, 64, 32, 1)


@pytest.mark.parametrize(
    ("data", "param"),
    [
        (f'{{{USER}, "seed": 1, "seed": 2}}', "seed"),
        (f'{{{USER}, "seed": 1, {USER}}}', "messages"),
        (f'{{{USER}, "extra_body": {{"n": 1, "n": 1}}}}', "n"),
        ('{"messages": [{"role": "user", "role": "user", "content": "x"}]}', "role"),
        (r'{"\ud800": 1, "\ud800": 2}', "\ud800"),
    ],
)
def test_a_field_that_is_there_twice_is_refused(data: str, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse(data.encode())
    assert caught.value.param == param
    assert caught.value.message == f"{param} is given 2 times in one object; allowed: once"


@pytest.mark.parametrize("stream", [None, False])
def test_what_only_a_stream_can_carry_has_no_effect_without_one(stream: bool | None) -> None:
    """No preview is decoded that would not be sent."""
    options = {"stream_options": {"include_usage": True, "include_progress": True}, "partial_images": 2}
    assert generation(chat_body(stream=stream, **options)) == generation(chat_body())
    assert generation(chat_body(stream=True, **options)).partial_images == 2


def test_a_byte_order_mark_is_no_part_of_the_body() -> None:
    assert parse(b"\xef\xbb\xbf{" + USER.encode() + b"}").messages[0].role == "user"


LONG = "9" * 1_000_000


@pytest.mark.parametrize(
    "fields",
    [
        {"height": LONG},
        {"height": [LONG] * 9},
        {"stop": [1] * 1_000_000},
        {LONG: 1},
        {"extra_body": {LONG: 1}},
        {"modalities": [LONG]},
        {"messages": [{"role": LONG, "content": "x"}]},
        {"messages": [{"role": "user", "content": [image_part(LONG)]}]},
        {"messages": [{"role": "user", "content": [image_part(f"http://{LONG}")]}]},
        {"messages": [{"role": "user", "content": [image_part(f"data:;base64,{LONG}*")]}]},
    ],
    ids=lambda fields: str(fields)[:30],
)
def test_a_long_value_is_cut_in_the_message(fields: dict[str, object]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        generation(chat_body(**fields))
    assert len(caught.value.message) < 1200  # the known fields' names are 900 of them
    assert len(caught.value.param or "") <= 120
