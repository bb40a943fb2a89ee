"""Request bodies of popular clients and the expected result: a text, an image, or a 400 that names the field.

They are what OpenAI's SDK, LangChain, LiteLLM, LibreChat, Open WebUI, SillyTavern, OpenRouter's and
Ollama's clients and load generators send by default or on request.
"""

from __future__ import annotations

import base64
import io
import struct
from dataclasses import dataclass
from typing import Any

from PIL import Image

RED = (255, 0, 0)


@dataclass(frozen=True)
class Shape:
    """A body; ``gives`` is ``text`` or ``image``, or ``names`` is the field that a 400 names."""

    name: str
    body: dict[str, Any]
    gives: str = ""
    names: str = ""


def encoded(file_format: str = "PNG", image: Image.Image | None = None, **options: Any) -> bytes:
    buffer = io.BytesIO()
    (image or Image.new("RGB", (40, 30), RED)).save(buffer, file_format, **options)
    return buffer.getvalue()


def data_url(data: bytes, head: str = "data:image/png;base64,") -> str:
    return head + base64.b64encode(data).decode()


def exif(tag: int, kind: int, value: bytes) -> bytes:
    """EXIF data of two entries: turned by 90 degrees, and ``tag`` of type ``kind``."""
    entry = struct.pack("<HHL", tag, kind, 1)
    inline = value.ljust(4, b"\0") if len(value) <= 4 else struct.pack("<L", 38)
    rest = b"" if len(value) <= 4 else value
    head = struct.pack("<LH", 8, 2) + struct.pack("<HHLHH", 0x112, 3, 1, 6, 0)
    return b"Exif\0\0II*\0" + head + entry + inline + b"\0" * 4 + rest


BROKEN_EXIF = {
    "rational -1/0": exif(0x11A, 10, struct.pack("<ll", -1, 0)),
    "short -1": exif(0x11A, 8, struct.pack("<h", -1)),
    "long -1": exif(0x11A, 9, struct.pack("<l", -1)),
    "date as a rational": exif(0x132, 5, struct.pack("<LL", 5, 2)),
    "double NaN": exif(0x11A, 12, struct.pack("<d", float("nan"))),
}
PNG = data_url(encoded())
TINY = data_url(encoded(image=Image.new("RGB", (1, 1), RED)))
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
DRAW: dict[str, Any] = {
    "messages": [{"role": "user", "content": "a cat"}],
    "modalities": ["image"],
    "height": 64,
    "width": 64,
    "num_inference_steps": 4,
    "seed": 1,
}


def chat(**fields: Any) -> dict[str, Any]:
    return CHAT | fields


def draw(*without: str, **fields: Any) -> dict[str, Any]:
    return {name: value for name, value in (DRAW | fields).items() if name not in without}


def talk(*messages: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return CHAT | {"messages": list(messages)} | fields


def user(content: Any = "hi", **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **more}


def assistant(content: Any = "hello", **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def system(content: Any = "Be brief.", **more: Any) -> dict[str, Any]:
    return {"role": "system", "content": content, **more}


def text(words: str = "what is it", **more: Any) -> dict[str, Any]:
    return {"type": "text", "text": words, **more}


def image(url: Any = PNG, **more: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": url if isinstance(url, dict) else {"url": url}, **more}


def look(url: Any = PNG, **fields: Any) -> dict[str, Any]:
    return talk(user([text(), image(url)]), **fields)


SDK_NULLS: dict[str, Any] = {
    "refusal": None,
    "annotations": [],
    "audio": None,
    "function_call": None,
    "tool_calls": None,
}
SHOWN = [{"type": "image_url", "image_url": {"url": PNG}, "index": 0, "seed": 3}]
WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "user": ("u1",),
    "safety_identifier": ("x",),
    "prompt_cache_key": ("x",),
    "prompt_cache_retention": ("24h",),
    "service_tier": ("auto", "flex"),
    "store": (True, False),
    "metadata": ({"a": "b"}, {}),
    "parallel_tool_calls": (True, False),
    "verbosity": ("medium",),
    "prediction": ({"type": "content", "content": "x"}, None),
    "best_of": (1,),
    "min_p": (0, 0.05),
    "top_logprobs": (None, 3),
    "tools": ([], None),
    "tool_choice": ("auto", "none", "required"),
    "functions": ([],),
    "function_call": ("none",),
    "response_format": ({"type": "text"}, ""),
    "logit_bias": ({}, {"5": 1}),
    "presence_penalty": (0, 0.5),
    "frequency_penalty": (0, 0.5),
    "repetition_penalty": (1.1,),
    "extra_body": ({}, None, {"top_k": 3}),
    "provider": ({"order": ["x"]},),
    "transforms": ([], ["middle-out"]),
    "route": ("fallback",),
    "usage": ({"include": True},),
    "include_reasoning": (True, False),
    "reasoning": ({"exclude": True}, {"exclude": False}),
    "stream_options": ({"include_usage": True, "continuous_usage_stats": True}, {}),
    "partial_images": (2,),
    "skip_special_tokens": (True,),
    "ignore_eos": (False, True),
    "min_tokens": (0, 3),
    "reasoning_effort": ("",),
    "modalities": ([],),
    "reasoning_summary": ("auto",),
    "litellm_session_id": ("x",),
    "safe_prompt": (False,),
    "enable_search": (False,),
    "search_parameters": ({"mode": "off"},),
    "quality": ("hd",),
    "output_format": ("png",),
    "stop_token_ids": ([],),
    "use_beam_search": (False,),
    "length_penalty": (1.0,),
    "typical_p": (1,),
    "mirostat": (0,),
    "top_a": (0,),
    "max_tokens": (-1,),
    "keep_alive": ("5m",),
    "cache_prompt": (True,),
    "rid": ("x",),
    "chat_id": ("x",),
    "repeat_penalty": (1,),
    "repetition_penalty_range": (0,),
    "n_predict": (-1,),
    "options": ({},),
    "format": ("",),
    "reasoning_format": ("auto", "parsed"),
    "separate_reasoning": (True,),
    "num_outputs_per_prompt": (1,),
    "thinking_budget": (16,),
    "enable_teacache": (False,),
    "extra_args": ({}, {"top_k": 3, "do_sample": False}),
    "do_sample": (True, False),
    "text_temperature": (0, 0.3),
    "top_p": (0, 0.9),
    "return_stage_metrics": (True, False),
    "continue_final_message": (True, False),
    "add_generation_prompt": (True, False),
    "generator_device": ("cuda",),
    "audio": (None,),
    "no_such_field": (None,),
    "logprobs": (False, True),
    "seed": (-1, 7),
    "guidance_scale": (4.0,),
    "cache_control": ({"type": "ephemeral"},),
    "debug": ({"echo_upstream_body": True},),
    "ttl": (300,),
    "context_length_exceeded_behavior": ("error",),
    "vl_high_resolution_images": (True,),
    "detokenize": (True,),
    "nvext": ({},),
    "structured_outputs": (False,),
    "image_reply": ("",),
    "cache": ("",),
    "model": ("",),
    "stop": ("", []),
    "aspect_ratio": ("", "auto", "16:9", "match_input_image"),
    "image_size": ("auto", "64x64", "1K", {"width": 64, "height": 64.0}),
    "image_config": ({}, {"aspect_ratio": "21:9", "image_size": "1K"}),
    "height": (64, 512),
    "num_inference_steps": (25,),
    "negative_prompt": ("blurry",),
    "size": ("512x512", "auto"),
    "logits_processors": ([], None),
    "system_prompt": ("",),
    "num_frames": (1,),
    "user_id": ("u1",),
    "sampling_params_list": ([],),
    "max_completion_tokens": (4,),
    "priority": (5,),
    "cache_salt": ("x",),
    "mm_processor_kwargs": ({},),
    "chat_template_kwargs": ({},),
    "thinking_token_budget": (50,),
    "post_sampling_probs": (None,),
}
REFUSED: dict[str, tuple[Any, ...]] = {
    "tools": ([{"type": "function", "function": {"name": "f", "parameters": {}}}],),
    "functions": ([{"name": "f"}],),
    "response_format": ({"type": "json_object"}, {"type": "json_schema", "json_schema": {"name": "x"}}),
    "audio": ({"voice": "alloy", "format": "wav"},),
    "web_search_options": ({},),
    "best_of": (2,),
    "ignore_eos": (1,),
    "min_tokens": (-1,),
    "enable_search": (True,),
    "output_format": ("jpeg",),
    "background": ("transparent",),
    "guided_json": ({"type": "object"},),
    "mirostat": (2,),
    "options": ({"num_ctx": 8192},),
    "format": ("json",),
    "repeat_penalty": (1.1,),
    "reasoning_format": ("none",),
    "lora": ({"name": "x"},),
    "samplers": ("kypmxt",),
    "guidance_scal": (3,),
    "chat_template": ("{{ x }}",),
    "reasoning_effort": ("enormous",),
    "size": ("large", "64", "64x64x64"),
    "logit_bias": ({"a": 1}, {"5": 500}, []),
    "frequency_penalty": (3, "1"),
    "min_p": (2,),
    "max_tokens": (0, -2, "5", 2.5),
    "temperature": (3, -1, "hot"),
    "stop": (5, [""]),
    "n": (0, 1.5),
    "modalities": (["audio"], "text", [5]),
    "logprobs": (5,),
    "seed": (-2, 1.5),
    "random_seed": (7,),
    "do_sample": ("yes",),
    "extra_args": ([], {"heigth": 64}),
    "continue_final_message": (1,),
    "max_new_tokens": (5,),
    "aspect_ratio": ("wide", "0:1", 1.5),
    "image_size": ("2K", "4K", [64], {"width": 64}),
    "image_config": ({"image_size": "0.5K"}, "16:9"),
    "strength": (0.7,),
    "system_prompt": ("Be brief.",),
    "output_modalities": (["image"],),
    "guidance_scale_2": (3.0,),
    "layers": (4,),
    "sampling_params_list": ([{"temperature": 0}],),
    "mm_processor_kwargs": ({"fps": 1},),
    "max_completion_tokens": (5,),
    "prompt_logprobs": (0,),
    "input": ("hi",),
    "nvext": ({"ignore_eos": True},),
}
THINKING: tuple[dict[str, Any], ...] = (
    {"think": True},
    {"reasoning_effort": "low"},
    {"reasoning_effort": "high"},
    {"reasoning_effort": "auto"},
    {"thinking": {"type": "auto"}},
    {"reasoning": {"effort": "medium"}},
    {"reasoning": {"enabled": True}},
    {"reasoning": {"max_tokens": 20}},
    {"thinking": {"type": "enabled", "budget_tokens": 20}},
    {"enable_thinking": True},
    {"chat_template_kwargs": {"enable_thinking": True}},
    {"chat_template_kwargs": {"thinking": True}},
    {"chat_template_kwargs": {"reasoning_effort": "high", "thinking_budget": 20, "clear_thinking": False}},
    {"thinking": {"type": "enabled", "clear_thinking": True, "display": "summarized"}},
    {"reasoning_effort": "low", "chat_template_kwargs": {"enable_thinking": True}},
)
NOT_THINKING: tuple[dict[str, Any], ...] = (
    {"think": False},
    {"reasoning_effort": "none"},
    {"reasoning_effort": "minimal"},
    {"reasoning": {"effort": "none"}},
    {"reasoning": {"enabled": False}},
    {"reasoning": {"enabled": False, "max_tokens": 0}},
    {"thinking": {"type": "disabled"}},
    {"thinking": {"type": "disabled", "budget_tokens": 0}},
    {"enable_thinking": False},
    {"chat_template_kwargs": {"enable_thinking": False, "add_generation_prompt": True}},
    {"chat_template_kwargs": {"reasoning_effort": "none"}},
    {"modalities": ["text", "image"], "think": False},
)
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "the SDK's reply": [user(), assistant(**SDK_NULLS), user()],
    "LiteLLM's reply": [user(), assistant(provider_specific_fields={"refusal": None}, reasoning_content="hm"), user()],
    "a reply with all it said of itself": [
        user(),
        assistant(status="completed", type="message", finish_reason="stop", citations=[], extra_content={"google": {}}),
        user(),
    ],
    "OpenRouter's reply": [user(), assistant(reasoning="hm", reasoning_details=[{"type": "x"}], refusal=None), user()],
    "our image as images": [user(), assistant("", images=SHOWN), user("and now?")],
    "our image as both": [user(), assistant(SHOWN, images=SHOWN), user("and now?")],
    "empty assistant": [user("draw"), assistant(""), user()],
    "null assistant": [user("draw"), assistant(None, reasoning_content="hm"), user()],
    "assistant of no parts": [user("draw"), assistant([]), user()],
    "assistant without content": [user("draw"), {"role": "assistant"}, user()],
    "refused before": [user(), assistant([{"type": "refusal", "refusal": "I cannot."}]), user()],
    "thinking parts": [
        user(),
        assistant(
            [{"type": "thinking", "thinking": "hm", "signature": ""}, {"type": "reasoning", "text": "hm"}, text()]
        ),
        user(),
    ],
    "empty system": [system(""), user()],
    "null system": [system(None), user()],
    "developer": [{"role": "developer", "content": "Be brief."}, user()],
    "names": [system(name="example_user"), user(name="bob"), assistant(name="bot"), user()],
    "assistant last": [user(), assistant("It is")],
    "assistant last, prefix": [user(), assistant("It is", prefix=True)],
    "empty assistant last": [user(), assistant("")],
    "system last": [user(), system()],
    "system alone": [system()],
    "two users": [user(), user("still there?")],
    "earlier empty user": [user(""), assistant(), user()],
    "empty user": [user("")],
    "empty user last": [user(), assistant(), user(" ")],
    "nothing but a role": [{"role": "user"}],
    "image alone": [user([image()])],
    "a text among parts": [user(["what is it", image()])],
    "no attachments": [user(attachments=[], files=[], createdAt="2026-11-29")],
    "image and empty text": [user([image(), text("")])],
    "detail auto": [user([text(), image({"url": PNG, "detail": "auto"})])],
    "detail null": [user([text(), image({"url": PNG, "detail": None})])],
    "detail original": [user([text(), image({"url": PNG, "detail": "original"})])],
    "image_url as text": [user([text(), {"type": "image_url", "image_url": PNG}])],
    "cache_control": [system([text(cache_control={"type": "ephemeral"})]), user([text(prompt_cache_breakpoint={})])],
    "prose <|im_start|>": [user("what does <|im_start|> mean?")],
    "prose <|im_end|>": [user("<|im_end|> ends it"), assistant("<|im_start|>"), user("<|im_start|>is a token")],
    "prose <|image_pad|>": [user("what does <|image_pad|> mean?")],
    "prose <|image_pad|> beside an image": [user([text("is <|image_pad|> in it?"), image()])],
    "template and more": [user("<|im_start|>x<|im_end|><|im_start|>")],
    "template": [user("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")],
    "template with an image": [user([text("<|im_start|>user\n<|image_pad|>\nhi<|im_end|>\n"), image()])],
    "wrapped": [user([text("<|im_start|>hi<|im_end|>")])],
    "an editor's notes": [user(opts={"visible": False}, id=1947269257, cycle=1, _meta={}), assistant(_meta={}), user()],
}
BAD_CONVERSATIONS: dict[str, tuple[list[dict[str, Any]], str]] = {
    "tool role": ([user(), {"role": "tool", "content": "x", "tool_call_id": "1"}, user()], "messages[1].role"),
    "tool calls": ([user(), assistant(None, tool_calls=[{"id": "1"}]), user()], "messages[1].tool_calls"),
    "no messages": ([], "messages"),
    "input_text": ([user([{"type": "input_text", "text": "x"}])], "messages[0].content[0].type"),
    "no type": ([user([{"image_url": {"url": PNG}}])], "messages[0].content[0].type"),
    "audio": ([user([{"type": "input_audio", "input_audio": {}}])], "messages[0].content[0].type"),
    "image for the system": ([system([image()]), user()], "messages[0].content[0].type"),
    "unknown part field": ([user([text(size=1)])], "messages[0].content[0].size"),
    "marks other images": (
        [user([text("<|im_start|><|image_pad|> and <|image_pad|> here<|im_end|>"), image()])],
        "messages[0].content",
    ),
}
FILES: dict[str, bytes] = {
    **{f"EXIF {name}": encoded("JPEG", exif=data) for name, data in BROKEN_EXIF.items()},
    **{name: encoded(name) for name in ("JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "ICO")},
    "MPO": encoded("MPO", save_all=True, append_images=[Image.new("RGB", (40, 30))]),
    "CMYK": encoded("JPEG", Image.new("CMYK", (40, 30), (0, 255, 255, 0))),
    "16 bits": encoded("PNG", Image.new("I;16", (40, 30), 40_000)),
    "animation": encoded("GIF", save_all=True, append_images=[Image.new("RGB", (40, 30))]),
    "broken profile": encoded("PNG", icc_profile=b"junk"),
    "thin": encoded("PNG", Image.new("RGB", (500, 19))),
    "long": encoded("PNG", Image.new("RGB", (1, 2000))),
}
STANDARD = base64.b64encode(encoded("JPEG")).decode()
URL_SAFE = base64.urlsafe_b64encode(encoded("JPEG")).decode()
URLS = {
    "URL-safe": f"data:image/jpeg;base64,{URL_SAFE}",
    "URL-safe, no padding": f"data:image/jpeg;base64,{URL_SAFE.rstrip('=')}",
    "no padding": f"data:image/jpeg;base64,{STANDARD.rstrip('=')}",
    "blank before base64": f"data:image/jpeg; base64,{STANDARD}",
    "blank after the comma": f"data:image/jpeg;base64, {STANDARD} ",
    "blank before": f" data:image/jpeg;base64,{STANDARD}",
    "charset": f"data:image/jpeg;charset=utf-8;base64,{STANDARD}",
    "lines": "data:image/jpeg;base64," + "\r\n".join(STANDARD[at : at + 76] for at in range(0, len(STANDARD), 76)),
    "percent signs": "data:image/jpeg;base64," + STANDARD.replace("+", "%2B").replace("/", "%2F"),
    "upper case": f"DATA:IMAGE/JPEG;BASE64,{STANDARD}",
    "no media type": f"data:;base64,{STANDARD}",
    "another media type": f"data:application/octet-stream;base64,{STANDARD}",
}
BAD_URLS = {
    "corrupt": f"data:image/jpeg;base64,{STANDARD[:20]}!!{STANDARD[22:]}",
    "a form's blanks": "data:image/jpeg;base64," + STANDARD.replace("+", " "),
    "cut": f"data:image/jpeg;base64,{STANDARD[: len(STANDARD) // 8 * 4]}",
    "not an image": data_url(b"<html>"),
    "a path": "/etc/passwd",
    "a file": "file:///etc/passwd",
    "a private address": "http://127.0.0.1:9/cat.png",
}


def _shapes() -> list[Shape]:
    shapes = [
        *(Shape(f"{n}={v!r}", chat(**{n: v}), "text") for n, values in WITHOUT_EFFECT.items() for v in values),
        *(Shape(f"{n}={v!r} refused", chat(**{n: v}), names=n) for n, values in REFUSED.items() for v in values),
        *(Shape(f"thinking: {fields}", chat(**fields), "text") for fields in THINKING),
        *(Shape(f"messages: {name}", talk(*messages), "text") for name, messages in CONVERSATIONS.items()),
        *(Shape(f"bad: {name}", talk(*messages), names=n) for name, (messages, n) in BAD_CONVERSATIONS.items()),
        *(Shape(f"file: {name}", look(data_url(data)), "text") for name, data in FILES.items()),
        *(Shape(f"URL: {name}", look(url), "text") for name, url in URLS.items()),
        *(Shape(f"bad URL: {name}", look(url), names="image_url") for name, url in BAD_URLS.items()),
    ]
    drawn: dict[str, dict[str, Any]] = {
        "chat UI's defaults": draw(temperature=1, top_p=1, max_tokens=1024, presence_penalty=0, frequency_penalty=0),
        "sliders": draw(temperature=0.7, top_p=0.9, top_k=40, min_p=0.05, repetition_penalty=1.1, stop=["\n"]),
        "seed -1": draw(seed=-1),
        "size": draw("height", "width", size="64x64"),
        "size auto beside sides": draw(size="auto"),
        "SiliconFlow's size": draw("height", "width", image_size="64x64"),
        "sides in an object": draw("height", "width", image_size={"width": 64, "height": 64}),
        "OpenRouter's ratio": draw("height", "width", image_config={"aspect_ratio": "3:4"}),
        "a ratio": draw("height", "width", aspect_ratio="9:16"),
        "a ratio and a side": draw("height", aspect_ratio="2:1"),
        "a ratio beside its sides": draw(aspect_ratio="1:1", image_config={"aspect_ratio": "1:1"}),
        "64.0": draw(height=64.0, num_inference_steps=4.0, seed=1.0, n=1.0),
        "guidance_scale": draw(guidance_scale=4.0, true_cfg_scale=1.5),
        "cfg_scale": draw(cfg_scale=4.0, flow_shift=3.0, num_images_per_prompt=1),
        "steps": draw("num_inference_steps", steps=4),
        "steps by two names": draw(steps=4),
        "size beside its sides": draw(size="64x64"),
        "guidance by two names": draw(cfg_text_scale=4, guidance_scale=4.0),
        "seed beside extra_body's": draw(extra_body={"seed": 1}),
        "text and image": draw(modalities=["text", "image"]),
        "image and text": draw(modalities=["image", "text"]),
        "in extra_body": {"messages": DRAW["messages"], "extra_body": draw("messages")},
        "edit": draw(messages=[user([text("make it blue"), image()])]),
        "edit, its own size": draw(
            "height", "width", messages=[user([text("make it blue"), image()])], aspect_ratio="match_input_image"
        ),
        "edit of our own image": draw(messages=[user("a cat"), assistant(SHOWN), user("make it blue")]),
        "system last": draw(messages=[user("a cat"), system("in oil")]),
        "assistant last": draw(messages=[user("a cat"), assistant("Here it is:")]),
        "prose with marks": draw(messages=[user("a sign that says <|im_start|> and <|image_pad|>")]),
        "wrapped": draw(messages=[user([text("<|im_start|>a cat<|im_end|>")])]),
        **{f"no thinking: {f}": draw(**f) for f in NOT_THINKING},
    }
    shapes += [Shape(f"image: {name}", body, "image") for name, body in drawn.items()]
    refused: dict[str, tuple[dict[str, Any], str]] = {
        "height as text": (draw(height="64"), "height"),
        "height 17": (draw(height=17), "height"),
        "size 17": (draw("height", "width", size="64x17"), "size"),
        "thinking budget": (draw(reasoning={"max_tokens": -1}), "reasoning.max_tokens"),
        "two spellings": (draw(steps=5), "steps"),
        "guidance twice": (draw(cfg_text_scale=4, guidance_scale=3), "guidance_scale"),
        "size and height": (draw(size="128x64"), "size"),
        "size and image_size": (draw("height", "width", size="64x64", image_size="64x32"), "image_size"),
        "a ratio and other sides": (draw(aspect_ratio="2:1"), "aspect_ratio"),
        "two ratios": (draw(aspect_ratio="1:1", image_config={"aspect_ratio": "2:1"}), "image_config.aspect_ratio"),
        "more than it draws": (draw("height", "width", image_size={"width": 64, "height": 17}), "image_size.height"),
        "seed twice": (draw(extra_body={"seed": 2}), "extra_body.seed"),
        "think twice": (draw(think=True, reasoning_effort="none"), "reasoning_effort"),
        "think both ways": (draw(reasoning={"enabled": True, "effort": "none"}), "reasoning.effort"),
        "image without words": (draw(messages=[user([image()])]), "messages[0].content"),
        "no words": (draw(messages=[user("")]), "messages[0].content"),
        "in extra_body": (draw("height", extra_body={"height": 17}), "extra_body.height"),
        "unknown in extra_body": (draw(extra_body={"heigth": 64}), "extra_body.heigth"),
        "in extra_args": (draw("height", extra_body={"extra_args": {"height": 17}}), "extra_body.extra_args.height"),
        "seed in both": (draw("seed", extra_body={"seed": 2}, extra_args={"seed": 3}), "extra_args.seed"),
        "damaged": (draw(messages=[user([text(), image(BAD_URLS["cut"])])]), "image_url"),
    }
    return [*shapes, *(Shape(f"image refused: {name}", body, names=field) for name, (body, field) in refused.items())]


SHAPES = _shapes()
