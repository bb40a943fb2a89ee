"""The request: its fields, their limits and defaults, and its form as tensors."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bagel_triton.model.flow import get_timesteps
from bagel_triton.protocol.errors import InvalidRequest
from bagel_triton.protocol.messages import Decoding, FlowSettings
from bagel_triton.protocol.request import (
    FIELD_ALIASES,
    IMG2IMG,
    MAX_SEED,
    REQUEST_FIELDS,
    TEXT2IMG,
    GenerationRequest,
    ImageRef,
    TextPart,
    Turn,
)
from bagel_triton.protocol.tensors import from_tensors, to_tensors
from bagel_triton.protocol.validation import check_text_size, resolve_decoding, resolve_flow, resolve_modality

MAX_SIDE = 1024
NAN, INFINITY = math.nan, math.inf


def _resolve(max_side: int = MAX_SIDE, **fields: Any) -> FlowSettings:
    return resolve_flow(GenerationRequest(prompt="A cat", **fields), max_side, TEXT2IMG)


def test_what_is_left_out_has_the_servers_defaults() -> None:
    settings = _resolve(seed=5)
    assert (settings.height, settings.width, settings.num_inference_steps, settings.seed) == (512, 512, 50, 5)
    assert (settings.cfg_text_scale, settings.cfg_img_scale, settings.cfg_interval) == (4.0, 1.5, (0.4, 1.0))
    assert (settings.cfg_renorm_type, settings.cfg_renorm_min, settings.timestep_shift) == ("global", 0.0, 3.0)


def test_what_is_given_is_kept() -> None:
    fields: dict[str, Any] = {
        "height": 64,
        "width": 1024,
        "num_inference_steps": 2,
        "seed": 0,
        "cfg_text_scale": 0.0,
        "cfg_img_scale": 0.5,
        "cfg_interval": (0.0, 0.0),
        "cfg_renorm_type": "text_channel",
        "cfg_renorm_min": 1.0,
        "timestep_shift": 0.25,
    }
    settings = _resolve(**fields)
    assert {name: getattr(settings, name) for name in fields} == fields


def test_an_edit_has_the_authors_defaults_for_edits() -> None:
    settings = resolve_flow(GenerationRequest(prompt="A cat", seed=1), MAX_SIDE, IMG2IMG)
    assert (settings.cfg_text_scale, settings.cfg_img_scale, settings.cfg_interval) == (4.0, 2.0, (0.0, 1.0))
    assert settings.cfg_renorm_type == "text_channel"


@pytest.mark.parametrize(("given", "side"), [({"height": 256}, 256), ({"width": 128}, 128)])
def test_one_side_alone_means_a_square(given: dict[str, int], side: int) -> None:
    settings = _resolve(**given)
    assert (settings.height, settings.width) == (side, side)


@pytest.mark.parametrize(
    ("ratio", "width", "height"),
    [
        ("1:1", 512, 512),
        ("2:3", 416, 624),
        ("3:2", 624, 416),
        ("3:4", 448, 592),
        ("4:3", 592, 448),
        ("4:5", 464, 576),
        ("5:4", 576, 464),
        ("9:16", 384, 688),
        ("16:9", 688, 384),
        ("21:9", 784, 336),
        ("1.91 : 1", 704, 368),
        ("1:9999", 16, 1024),
    ],
)
def test_a_ratio_is_an_image_of_about_the_usual_area(ratio: str, width: int, height: int) -> None:
    flow = _resolve(aspect_ratio=ratio)
    assert (flow.width, flow.height) == (width, height)


@pytest.mark.parametrize(
    ("fields", "width", "height"),
    [
        ({"width": 1024}, 1024, 576),
        ({"height": 288}, 512, 288),
        ({"width": 688, "height": 384}, 688, 384),
        ({"width": 1024, "height": 576}, 1024, 576),
    ],
)
def test_a_ratio_gives_the_side_that_is_left_out(fields: dict[str, int], width: int, height: int) -> None:
    flow = _resolve(aspect_ratio="16:9", **fields)
    assert (flow.width, flow.height) == (width, height)


def test_a_ratio_of_an_edit_has_the_area_of_its_image_where_that_fits() -> None:
    request = GenerationRequest(prompt="x", aspect_ratio="3:2")
    sizes = [resolve_flow(request, 1024, IMG2IMG, size) for size in ((256, 256), (1024, 1024))]
    assert [(flow.width, flow.height) for flow in sizes] == [(320, 208), (1024, 688)]


def test_the_default_size_fits_a_checkpoint_with_a_small_table() -> None:
    settings = _resolve(max_side=320)
    assert (settings.height, settings.width) == (320, 320)


def test_a_seed_is_drawn_if_none_or_a_random_one_is_given() -> None:
    seeds = {_resolve(seed=seed).seed for seed in (None, -1) for _ in range(10)}
    assert len(seeds) > 15
    assert all(0 <= seed <= MAX_SEED for seed in seeds)


SIDE = "a multiple of 16 from 16 to 1024"
SCALE = "a number from 0 to 1000"


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("height", 0, SIDE),
        ("height", -16, SIDE),
        ("height", 500, SIDE),
        ("width", 1040, SIDE),
        ("width", 8, SIDE),
        ("num_inference_steps", 1, "an integer from 2 to 1000"),
        ("num_inference_steps", 0, "an integer from 2 to 1000"),
        ("aspect_ratio", "wide", "'W:H', such as '16:9'"),
        ("aspect_ratio", "16:0", "'W:H', such as '16:9'"),
        ("num_inference_steps", 1001, "an integer from 2 to 1000"),
        ("seed", -2, f"an integer from -1 to {MAX_SEED}; -1 draws one"),
        ("seed", 2**63, f"an integer from -1 to {MAX_SEED}"),
        ("partial_images", 4, "an integer from 0 to 3"),
        ("cfg_text_scale", -0.1, SCALE),
        ("cfg_text_scale", NAN, SCALE),
        ("cfg_img_scale", INFINITY, SCALE),
        ("cfg_img_scale", -1.0, SCALE),
        ("cfg_interval", (0.5, 0.4), "0 <= low <= high <= 1"),
        ("cfg_interval", (-0.1, 1.0), "0 <= low <= high <= 1"),
        ("cfg_interval", (0.0, 1.1), "0 <= low <= high <= 1"),
        ("cfg_interval", (NAN, 1.0), "0 <= low <= high <= 1"),
        ("cfg_renorm_type", "none", "global, channel, text_channel"),
        ("cfg_renorm_type", "", "global, channel, text_channel"),
        ("cfg_renorm_min", -0.1, "a number from 0 to 1"),
        ("cfg_renorm_min", 1.1, "a number from 0 to 1"),
        ("cfg_renorm_min", NAN, "a number from 0 to 1"),
        ("timestep_shift", 0.0, "a number from 0.001 to 1000"),
        ("timestep_shift", -3.0, "a number from 0.001 to 1000"),
        ("timestep_shift", INFINITY, "a number from 0.001 to 1000"),
    ],
)
def test_a_value_out_of_range_is_named_with_what_is_allowed(field: str, value: object, allowed: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        _resolve(**{field: value})
    assert refusal.value.param == field
    shown = repr(value) if isinstance(value, str) else json.dumps(value)
    assert refusal.value.message.startswith(f"{field}={shown} is not allowed; allowed: ")
    assert allowed in refusal.value.message


VOCAB = 512


def _decoding(wanted: str = "text", **fields: Any) -> Decoding:
    return resolve_decoding(GenerationRequest(prompt="A cat", **fields), 1, wanted, VOCAB)  # type: ignore[arg-type]


def test_text_is_greedy_and_plain_by_default() -> None:
    plain = _decoding()
    assert (plain.temperature, plain.top_p, plain.top_k, plain.min_p) == (0.0, 1.0, 0, 0.0)
    assert (plain.repetition_penalty, plain.frequency_penalty, plain.presence_penalty) == (1.0, 0.0, 0.0)
    assert (plain.logit_bias, plain.top_logprobs, plain.stop) == ({}, None, ())


@pytest.mark.parametrize("fields", [{"top_p": 0.5}, {"top_k": 3}, {"min_p": 0.1}])
def test_a_cut_of_the_distribution_alone_implies_sampling(fields: dict[str, Any]) -> None:
    assert _decoding(**fields).temperature == 1.0
    assert _decoding(**fields, temperature=0.0).temperature == 0.0


def test_a_cut_that_leaves_the_most_probable_token_alone_is_greedy() -> None:
    assert _decoding(top_p=0.0, temperature=1.5, seed=1) == _decoding(seed=1)


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("min_p", -0.1, "a number from 0 to 1"),
        ("min_p", NAN, "a number from 0 to 1"),
        ("top_p", -0.1, "a number from 0 to 1; 0 is greedy"),
        ("frequency_penalty", 2.1, "a number from -2 to 2"),
        ("presence_penalty", -2.1, "a number from -2 to 2"),
        ("top_logprobs", 21, "an integer from 0 to 20"),
        ("top_logprobs", -1, "an integer from 0 to 20"),
        ("logit_bias", {VOCAB: 1.0}, f"token ids from 0 to {VOCAB - 1}"),
        ("logit_bias", {-1: 1.0}, f"token ids from 0 to {VOCAB - 1}"),
        ("logit_bias", {3: 100.5}, "from -100 to 100"),
        ("logit_bias", {3: NAN}, "from -100 to 100"),
        ("logit_bias", dict.fromkeys(range(2000), 1.0), "at most 1024 token ids"),
        ("max_tokens", 0, "an integer from 1 to 32768"),
    ],
)
def test_a_sampling_value_out_of_range_is_named_with_what_is_allowed(field: str, value: object, allowed: str) -> None:
    with pytest.raises(InvalidRequest, match=f"^{field}=.* is not allowed; allowed: .*{allowed}") as refusal:
        _decoding(**{field: value})
    assert refusal.value.param == field


def test_fields_of_the_other_output_have_no_effect() -> None:
    """Chat clients send ``max_tokens`` beside images, and image clients ``height`` beside texts."""
    assert resolve_modality(GenerationRequest(prompt="x", modality="text", height=64, num_inference_steps=4)) == "text"
    thought = _decoding("image", think=True, seed=3)
    assert _decoding("image", think=True, seed=3, max_tokens=5, stop=("x",), top_logprobs=2, n=4) == thought
    with pytest.raises(InvalidRequest, match=r"^modality='video' is not allowed; allowed: image, text$"):
        resolve_modality(GenerationRequest(prompt="x", modality="video"))


def test_aliases_are_no_fields_themselves() -> None:
    assert FIELD_ALIASES["guidance_scale"] == "cfg_text_scale"
    assert not FIELD_ALIASES.keys() & REQUEST_FIELDS.keys()


def _row(name: str) -> str:
    """The field's row in the table of docs/api.md."""
    field = REQUEST_FIELDS[name]
    names = ", ".join(f"`{one}`" for one in (name, *field.aliases))
    shape = f"{field.datatype} [{field.length}]"
    return f"| {names} | {shape} | {field.affects} | {field.default} | {field.allowed} | {field.doc} |"


def test_the_documentation_has_every_field_as_it_is_declared() -> None:
    text = (Path(__file__).parents[2] / "docs" / "api.md").read_text()
    assert [row for row in map(_row, REQUEST_FIELDS) if row not in text] == []


def _accepted(**fields: float) -> FlowSettings | None:
    try:
        return _resolve(**fields)
    except InvalidRequest:
        return None


@pytest.mark.parametrize("shift", [1e-300, 1e-9, 1e38, 1e39, 1e300])
def test_a_shift_that_is_accepted_gives_finite_times(shift: float) -> None:
    """The flow computes in float32: what that cannot carry must not become a black image."""
    settings = _accepted(timestep_shift=shift)
    assert settings is None or bool(get_timesteps(4, settings.timestep_shift).isfinite().all())


@pytest.mark.parametrize("field", ["cfg_text_scale", "cfg_img_scale"])
@pytest.mark.parametrize("scale", [1e4, 1e30, 1e39, 1e300])
def test_a_scale_that_is_accepted_can_be_multiplied_with(field: str, scale: float) -> None:
    settings = _accepted(**{field: scale})
    assert settings is None or bool((torch.ones(1) * getattr(settings, field)).isfinite().all())


FULL = GenerationRequest(
    prompt="A café \N{CAT FACE}",
    negative_prompt="blurry",
    height=64,
    width=96,
    num_inference_steps=8,
    seed=2**62 + 1,
    cfg_text_scale=4.1,
    cfg_img_scale=1.7,
    cfg_interval=(0.1, 0.9),
    cfg_renorm_type="channel",
    cfg_renorm_min=0.3,
    timestep_shift=2.9,
    partial_images=2,
)


@pytest.mark.parametrize(
    "request_",
    [
        FULL,
        GenerationRequest(prompt="A cat"),
        GenerationRequest(prompt=""),
        GenerationRequest(
            messages=(Turn("user", (TextPart("What is 山?"), ImageRef(0))), Turn("assistant", (TextPart("It"),))),
            image=(b"\x89PNG\r\n\xff\x00", b""),
            modality="text",
            think=True,
            max_tokens=7,
            temperature=0.7,
            stop=("end", "\n"),
            min_p=0.1,
            frequency_penalty=-0.5,
            presence_penalty=1.5,
            logit_bias={7: -100.0, 12: 2.5},
            top_logprobs=0,
        ),
    ],
    ids=["all", "bare", "empty", "conversation"],
)
def test_a_request_travels_unchanged(request_: GenerationRequest) -> None:
    arrays = to_tensors(request_)
    assert from_tensors(arrays) == request_
    for name, array in arrays.items():
        spec = REQUEST_FIELDS[name]
        assert array.dtype == spec.numpy_type
        assert array.ndim == 1
    assert all(getattr(request_, name) is None for name in REQUEST_FIELDS.keys() - arrays.keys())


@pytest.mark.parametrize(("field", "value"), [("seed", 2**63), ("height", 2**31), ("width", -(2**31) - 1)])
def test_an_integer_too_long_for_its_tensor_is_named(field: str, value: int) -> None:
    with pytest.raises(InvalidRequest, match=f"^{field}={value} is not allowed; allowed: an integer"):
        to_tensors(GenerationRequest(prompt="A cat", **{field: value}))


@pytest.mark.parametrize("fields", [{"prompt": "a\udcff"}, {"negative_prompt": "\udcff"}, {"stop": ("x", "\ud800")}])
def test_half_a_character_is_named(fields: dict[str, Any]) -> None:
    (name,) = fields
    for refuse in (to_tensors, check_text_size):
        with pytest.raises(InvalidRequest, match=rf"^{name}='.*\\ud.*' is not allowed; allowed: UTF-8 text$"):
            refuse(GenerationRequest(**fields))


def test_a_tensor_of_the_wrong_length_is_named() -> None:
    arrays = to_tensors(FULL)
    for name, array in (("height", np.array([64, 64], np.int32)), ("cfg_interval", np.array([0.4]))):
        with pytest.raises(InvalidRequest, match=f"^{name}='{array.size} elements' is not allowed") as refusal:
            from_tensors(arrays | {name: array})
        assert refusal.value.param == name


@pytest.mark.parametrize("turns", [b"{nope", b'[{"role": "user"}]', b'[{"role": "' + b"x" * 9000 + b'", "parts": []}]'])
def test_messages_that_are_no_turns_are_shown(turns: bytes) -> None:
    with pytest.raises(
        InvalidRequest, match=r"^messages='.* is not allowed; allowed: a list of turns as JSON"
    ) as refusal:
        from_tensors({"messages": np.array([turns], dtype=np.object_)})
    assert len(refusal.value.message) < 400


def test_text_that_is_not_utf8_is_named() -> None:
    arrays = to_tensors(FULL)
    with pytest.raises(InvalidRequest, match=r"^negative_prompt=2 bytes is .* allowed: UTF-8 text \(byte 1 is not\)$"):
        from_tensors(arrays | {"negative_prompt": np.array([b"x\xff"], dtype=np.object_)})
