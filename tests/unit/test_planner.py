"""Texts and images of a request as segments: where each goes, and what has no place."""

from __future__ import annotations

import dataclasses
import io
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal

import pytest
from PIL import Image

from bagel_triton.deploy.config import DeployConfig
from bagel_triton.engine.preprocess.planner import RequestPlanner
from bagel_triton.model.image import ResizeRule
from bagel_triton.model.tokenizer import Tokenizer
from bagel_triton.protocol.errors import InvalidRequest
from bagel_triton.protocol.messages import Branch, Plan, Segment, TextSegment, VitSegment
from bagel_triton.protocol.request import GenerationRequest, ImageRef, TextPart, Turn
from bagel_triton.protocol.validation import MAX_MESSAGES, MAX_TEXT_BYTES
from bagel_triton.weights.checkpoint import inspect

PAD = "<|image_pad|>"


@pytest.fixture(scope="module")
def tokenizer(checkpoint_dir: Path) -> Tokenizer:
    return Tokenizer(checkpoint_dir)


@pytest.fixture(scope="module")
def planner(checkpoint_dir: Path, tokenizer: Tokenizer) -> RequestPlanner:
    return RequestPlanner(inspect(checkpoint_dir), tokenizer)


def encoded(side: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side)).save(buffer, "PNG")
    return buffer.getvalue()


SMALL, LARGE = encoded(512), encoded(1024)


def user(*parts: str | int) -> Turn:
    return Turn("user", tuple(TextPart(part) if isinstance(part, str) else ImageRef(part) for part in parts))


def said(role: Literal["system", "assistant"], *words: str) -> Turn:
    return Turn(role, tuple(map(TextPart, words)))


def branch(plan: Plan, name: Branch) -> tuple[Segment, ...]:
    return next(branch.segments for branch in plan.branches if branch.branch is name)


def gen_context(planner: RequestPlanner, tokenizer: Tokenizer, request: GenerationRequest) -> list[str]:
    """The ``gen`` context: texts, and ``SMALL`` and ``LARGE`` images by the sides they are resized to."""

    def name(segment: Segment) -> str:
        if isinstance(segment, TextSegment):
            return tokenizer.decode(list(segment.token_ids))
        assert isinstance(segment, VitSegment)
        return {518: "SMALL", 980: "LARGE"}[segment.width]

    plan = planner.expand(request)
    segments = [name(segment) for segment in branch(plan, Branch.GEN)]
    # A chat template's output is continued: its last token is fed by the decoding.
    if plan.decoding is not None and plan.decoding.first_token != tokenizer.start:
        segments[-1] += tokenizer.decode([plan.decoding.first_token])
    return segments


@pytest.mark.parametrize(
    ("prompt", "segments"),
    [
        ("What?", ["SMALL", "LARGE", "<|im_start|>What?<|im_end|>"]),
        (f"Is {PAD} in it?", ["SMALL", "LARGE", f"<|im_start|>Is {PAD} in it?<|im_end|>"]),
        (
            f"<|im_start|>See {PAD}{PAD} there<|im_end|>",
            ["<|im_start|>See ", "SMALL", "LARGE", " there<|im_end|>"],
        ),
        (
            f"<|im_start|>user\n{PAD}\n{PAD}What?<|im_end|>\n<|im_start|>assistant\n",
            ["<|im_start|>user\n", "SMALL", "\n", "LARGE", "What?<|im_end|>\n<|im_start|>assistant\n"],
        ),
    ],
)
def test_images_come_first_or_where_the_prompt_marks_them(
    planner: RequestPlanner, tokenizer: Tokenizer, prompt: str, segments: list[str]
) -> None:
    request = GenerationRequest(prompt, (SMALL, LARGE), modality="text")
    assert gen_context(planner, tokenizer, request) == segments


def test_a_wrapped_prompt_is_what_it_wraps_for_an_image_and_stands_as_it_is_for_a_text(
    planner: RequestPlanner, tokenizer: Tokenizer
) -> None:
    bare, wrapped = "What is this?", "<|im_start|>What is this?<|im_end|>"
    images = [planner.expand(GenerationRequest(prompt, seed=1)) for prompt in (bare, wrapped)]
    assert images[0].branches == images[1].branches
    answers = [planner.expand(GenerationRequest(prompt, modality="text")).decoding for prompt in (bare, wrapped)]
    assert [answer and answer.first_token for answer in answers] == [tokenizer.start, tokenizer.end]


def test_images_of_earlier_messages_go_where_those_mark_them(planner: RequestPlanner, tokenizer: Tokenizer) -> None:
    turns = (
        user(f"<|im_start|>This {PAD} here<|im_end|>", 1),
        Turn("assistant", (TextPart("A cat."),)),
        user(0),
        user("And?"),
    )
    request = GenerationRequest(messages=turns, image=(SMALL, LARGE), modality="text")
    texts = ["<|im_start|>A cat.<|im_end|>", "SMALL", "<|im_start|>And?<|im_end|>"]
    assert gen_context(planner, tokenizer, request) == [
        "<|im_start|>This ",
        "LARGE",
        " here<|im_end|>",
        *texts,
    ]


HI, EMPTY = "<|im_start|>Hi<|im_end|>", "<|im_start|><|im_end|>"


@pytest.mark.parametrize(
    ("turns", "segments"),
    [
        ((user("Hi"), said("assistant", "It is")), [HI, "<|im_start|>It is"]),
        ((user("Hi"), Turn("assistant", (TextPart("It is"),), ended=True)), [HI, "<|im_start|>It is<|im_end|>"]),
        ((user("Hi"), Turn("assistant", (), ended=True)), [HI]),
        ((user("Hi"), said("assistant", "")), [HI]),
        ((user("Hi"), said("assistant")), [HI]),
        ((said("system", " "), user("Hi")), [HI]),
        ((user("Hi"), said("system", "Rhyme.")), [HI, "<|im_start|>Rhyme.<|im_end|>"]),
        ((said("system", "Talk."),), ["<|im_start|>Talk.<|im_end|>"]),
        ((user(""), said("assistant", "Hm"), user("Hi")), ["<|im_start|>Hm<|im_end|>", HI]),
        ((user(""),), [EMPTY]),
        ((said("system", ""), said("assistant", "")), [EMPTY]),
        ((user("Hi"), said("assistant", "It is"), user(" ")), [HI, "<|im_start|>It is<|im_end|>", EMPTY]),
        ((user(0),), ["SMALL"]),
        ((user(" ", 0),), ["SMALL"]),
        (
            (user("Hi"), said("assistant", "Oh"), user(0)),
            [HI, "<|im_start|>Oh<|im_end|>", "SMALL"],
        ),
    ],
)
def test_a_conversation_may_end_with_anyone_and_what_is_empty_adds_nothing(
    planner: RequestPlanner, tokenizer: Tokenizer, turns: tuple[Turn, ...], segments: list[str]
) -> None:
    image = (SMALL,) if "SMALL" in segments else None
    request = GenerationRequest(messages=turns, image=image, modality="text")
    assert gen_context(planner, tokenizer, request) == segments


def test_an_empty_turn_that_is_ended_begins_a_new_one(planner: RequestPlanner, tokenizer: Tokenizer) -> None:
    """Even behind another of the assistant's, which would go on."""
    said_red = user("Which?"), said("assistant", "red")
    for last, begins in ((Turn("assistant", (), ended=True), True), (Turn("assistant", ()), False)):
        plan = planner.expand(GenerationRequest(messages=(*said_red, last), modality="text"))
        assert plan.decoding is not None
        assert (plan.decoding.first_token == tokenizer.start) is begins


@pytest.mark.parametrize("last", [said("system", "In oil."), said("assistant", "Here it is:")])
def test_guidance_compares_without_the_users_last_text_and_what_follows_it(
    planner: RequestPlanner, tokenizer: Tokenizer, last: Turn
) -> None:
    plan = planner.expand(GenerationRequest(messages=(said("system", "Draw."), user("A cat"), last)))
    assert len(branch(plan, Branch.GEN)) == 3
    assert branch(plan, Branch.CFG_TEXT) == branch(plan, Branch.GEN)[:1]


def test_an_image_needs_words_somewhere(planner: RequestPlanner) -> None:
    last = planner.expand(GenerationRequest(messages=(user("A cat"), user(0)), image=(SMALL,)))
    first = planner.expand(GenerationRequest(messages=(user("A cat"), user(""))))
    assert branch(first, Branch.GEN) == branch(last, Branch.GEN)[:1]
    assert branch(first, Branch.CFG_TEXT) == ()


def refused(planner: RequestPlanner, **fields: object) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as refusal:
        planner.expand(GenerationRequest(**fields))  # type: ignore[arg-type]
    return refusal.value


MARKS = "marks {} images with <|image_pad|>, and {} are given; allowed: a mark for each image of the message, or none"


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        (
            {"prompt": f"<|im_start|>{PAD}{PAD}x<|im_end|>", "image": (SMALL,)},
            "prompt",
            f"prompt='<|im_start|>{PAD}{PAD}x<|im_end|>' {MARKS.format(2, 1)}",
        ),
        (
            {"messages": (user("x", 0), user(f"<|im_start|>{PAD} b<|im_end|>")), "image": (SMALL,)},
            "messages[1].content",
            f"messages[1].content='<|im_start|>{PAD} b<|im_end|>' {MARKS.format(1, 0)}",
        ),
        (
            {"prompt": f"<|im_start|>What is this? {PAD}<|im_end|>", "image": (SMALL,)},
            "prompt",
            f"prompt='<|im_start|>What is this? {PAD}<|im_end|>' is not allowed; "
            f"allowed: a text that goes on after the last {PAD}",
        ),
        (
            {"prompt": "x", "negative_prompt": f"<|im_start|>no {PAD}<|im_end|>"},
            "negative_prompt",
            f"negative_prompt='<|im_start|>no {PAD}<|im_end|>' is not allowed; allowed: a template without {PAD}",
        ),
        *(
            (
                {"prompt": prompt, "image": image},
                "prompt",
                f"prompt={prompt!r} is not allowed; allowed: a text that is not empty{beside}",
            )
            for prompt in ("", "   ", "\n\t", "<|im_start|><|im_end|>", "<|im_start|>  <|im_end|>")
            for image, beside in ((None, ""), ((SMALL,), " beside the images"))
        ),
        (
            {"messages": (said("system", ""), user(0), user(" ")), "image": (SMALL,)},
            "messages[2].content",
            "messages[2].content=' ' is not allowed; allowed: a text that is not empty beside the images",
        ),
        (
            {"messages": (user("x", 0, 0, 7),), "image": (SMALL,)},
            "messages",
            "messages refer to images [0, 0, 7], and image holds 1; allowed: each of them once",
        ),
    ],
)
def test_what_has_no_place_is_refused(
    planner: RequestPlanner, fields: dict[str, object], param: str, message: str
) -> None:
    refusal = refused(planner, **fields)
    assert (refusal.message, refusal.param) == (message, param)


@pytest.mark.parametrize("text", [" ", "\n", "blurry"])
def test_any_negative_prompt_is_a_text_but_the_empty_one_is_none(
    planner: RequestPlanner, tokenizer: Tokenizer, text: str
) -> None:
    def context(negative: str) -> tuple[Segment, ...]:
        return branch(planner.expand(GenerationRequest("A cat", negative_prompt=negative)), Branch.CFG_TEXT)

    assert context(text) == (TextSegment((tokenizer.start, *tokenizer.encode(text), tokenizer.end)),)
    assert context("") == ()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": "word " * 2_400_000}, "prompt"),
        ({"prompt": "山" * (MAX_TEXT_BYTES // 3), "negative_prompt": "xx"}, "prompt"),
        ({"prompt": "x", "negative_prompt": "x" * MAX_TEXT_BYTES}, "negative_prompt"),
        ({"messages": (user("x" * MAX_TEXT_BYTES), user("x"))}, "messages"),
        ({"messages": (user("x"),) * (MAX_MESSAGES + 1)}, "messages"),
    ],
    ids=["prompt", "together", "negative", "messages", "many"],
)
def test_more_text_than_fits_is_refused_at_once(planner: RequestPlanner, fields: dict[str, object], param: str) -> None:
    started = time.monotonic()
    refusal = refused(planner, **fields)
    assert time.monotonic() - started < 3.0
    assert refusal.param == param
    assert "is not allowed; allowed: at most " in refusal.message
    assert len(refusal.message) < 200


def test_a_megabyte_of_text_is_still_looked_at(planner: RequestPlanner) -> None:
    message = "<|im_start|><|im_end|>"
    plan = planner.expand(GenerationRequest(message * (MAX_TEXT_BYTES // len(message))))
    assert plan.usage.prompt_tokens == MAX_TEXT_BYTES // len(message) * 2


def test_planning_needs_no_torch(checkpoint_dir: Path) -> None:
    """The planner's processes start sooner and are smaller for it."""
    program = """
import io, sys
from PIL import Image
from bagel_triton.deploy.config import DeployConfig
from bagel_triton.engine.preprocess.planner import RequestPlanner
from bagel_triton.protocol.request import GenerationRequest

Image.new("RGB", (64, 32)).save(image := io.BytesIO(), "PNG")
plan = RequestPlanner.open(DeployConfig(sys.argv[1])).expand(GenerationRequest("A cat", (image.getvalue(),)))
print(plan.flow.height, "torch" in sys.modules)
"""
    run = subprocess.run(
        [sys.executable, "-c", program, str(checkpoint_dir)], capture_output=True, text=True, check=False
    )
    assert (run.stdout, run.stderr) == ("512 False\n", "")


def test_the_configuration_bounds_the_sides_of_images(checkpoint_dir: Path) -> None:
    planner = RequestPlanner.open(DeployConfig(str(checkpoint_dir), max_generated_image_size=100 * 100))
    Image.new("RGB", (640, 320)).save(image := io.BytesIO(), "PNG")
    drawn, edited = (planner.expand(GenerationRequest("a cat", images)).flow for images in (None, (image.getvalue(),)))
    assert drawn is not None
    assert edited is not None
    assert (drawn.height, drawn.width) == (96, 96)
    assert (edited.height, edited.width) == (48, 96)
    with pytest.raises(InvalidRequest, match="height=112 is not allowed; allowed: a multiple of 16 from 16 to 96"):
        planner.expand(GenerationRequest("a cat", height=112))


def test_the_usual_size_is_what_the_checkpoint_was_trained_for(checkpoint_dir: Path, tokenizer: Tokenizer) -> None:
    config = inspect(checkpoint_dir)
    trained = ResizeRule(stride=16, longest=96, shortest=96)
    planner = RequestPlanner(dataclasses.replace(config, vae_resize=trained), tokenizer)
    usual, larger = (planner.expand(GenerationRequest("a cat", height=side)).flow for side in (None, 128))
    assert usual is not None
    assert larger is not None
    assert (usual.height, usual.width) == (96, 96)
    assert (larger.height, larger.width) == (128, 128)


def test_the_deploy_files_defaults_are_for_what_a_request_leaves_out(checkpoint_dir: Path, tmp_path: Path) -> None:
    from bagel_triton.deploy.config import read

    config = DeployConfig(
        str(checkpoint_dir),
        text_defaults={"temperature": 0.4, "top_k": 1, "max_tokens": 7, "stop": ["."], "seed": 5},
        image_defaults={"seed": 52, "num_inference_steps": 9, "cfg_interval": [0.1, 0.9], "height": 64, "think": True},
    )
    config.write(tmp_path / "deploy.yaml")  # as the stages read it
    planner = RequestPlanner.open(read(tmp_path / "deploy.yaml"))
    text = planner.expand(GenerationRequest(prompt="Hi", modality="text", temperature=0.9)).decoding
    assert text is not None
    assert (text.temperature, text.top_k, text.max_new_tokens, text.stop, text.seeds) == (0.9, 1, 7, (".",), (5,))
    plan = planner.expand(GenerationRequest(prompt="Hi", num_inference_steps=4, think=False))
    assert plan.flow is not None
    assert (plan.flow.seed, plan.flow.num_inference_steps, plan.flow.cfg_interval) == (52, 4, (0.1, 0.9))
    assert (plan.flow.height, plan.flow.width, plan.decoding) == (64, 64, None)
    assert planner.expand(GenerationRequest(prompt="Hi")).decoding is not None
    tall = planner.expand(GenerationRequest(prompt="Hi", aspect_ratio="1:4")).flow
    assert tall is not None
    assert (tall.height, tall.width) == (128, 32)  # of the default's area
