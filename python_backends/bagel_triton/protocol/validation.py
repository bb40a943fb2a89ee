"""A request's values, checked and completed.

Fields are declared with their limits and defaults in ``request.py``. A checkpoint's own
limits, the longest side and the vocabulary, are parameters. A field is only looked at
where it has an effect: image fields beside text output, and sampling fields beside an image
without thinking, may have any value of their type.
"""

from __future__ import annotations

import math
import re
import secrets
import time
from collections.abc import Collection
from typing import Any, TypeVar

from bagel_triton.protocol.errors import InvalidRequest, ModelNotFound
from bagel_triton.protocol.messages import LATENT_STRIDE, MAX_LOGIT_BIAS, Decoding, FlowSettings, SchedulingParams
from bagel_triton.protocol.request import (
    ASPECT_RATIO,
    MAX_BIASED_TOKENS,
    MAX_STOPS,
    RANDOM_SEED,
    REQUEST_FIELDS,
    TEXT,
    FlowDefaults,
    GenerationRequest,
    Modality,
    TextPart,
)

T = TypeVar("T")
MAX_IMAGE_BYTES = 32 * 2**20  # of one encoded image
MAX_MESSAGES = 2048  # of a conversation, and parts of a message
MAX_TEXT_BYTES = 2**20  # of all texts of a request, UTF-8: tokenising more takes seconds
MIN_TEMPERATURE = 1e-5  # float32 logits could overflow below it, and sampling is greedy anyway


def resolve_modality(request: GenerationRequest) -> Modality:
    """The kind of output ``request`` wants.

    Raises:
        InvalidRequest: an unknown modality.
    """
    return _resolve(request, "modality", "image")


def check_text_size(request: GenerationRequest) -> None:
    """Refuse text and messages that no context can hold before they are tokenised.

    Raises:
        InvalidRequest: names the field that holds most of it.
    """
    turns = request.messages or ()
    _require("messages", f"{len(turns)} messages", len(turns) <= MAX_MESSAGES, f"at most {MAX_MESSAGES}")
    written = (part.text for turn in turns for part in turn.parts if isinstance(part, TextPart))
    sizes = {
        "prompt": len(utf8("prompt", request.prompt or "")),
        "messages": sum(len(utf8("messages", text)) for text in written),
        "negative_prompt": len(utf8("negative_prompt", request.negative_prompt or "")),
        "stop": sum(len(utf8("stop", text)) for text in request.stop or ()),
    }
    total, most = sum(sizes.values()), max(sizes, key=lambda name: sizes[name])
    _require(most, f"{total} bytes of text in all", total <= MAX_TEXT_BYTES, f"at most {MAX_TEXT_BYTES} in a request")


def check_adapter(name: str | None, known: Collection[str]) -> None:
    """Refuse the ``name`` of an adapter that is not ``known``; none and an empty one are the model itself.

    Raises:
        ModelNotFound: no adapter is called so.
    """
    if name and name not in known:
        raise ModelNotFound.value("lora", name, ", ".join(known) or "none, as this server has no lora_modules")


def resolve_n(request: GenerationRequest) -> int:
    """Number of images or answers wanted."""
    return _resolve(request, "n", 1)


def resolve_seed(request: GenerationRequest) -> int:
    """The request's seed; a random one if it has none, or -1."""
    seed = _resolve(request, "seed", RANDOM_SEED)
    return secrets.randbits(31) if seed == RANDOM_SEED else seed


def resolve_scheduling(request: GenerationRequest, timeout_s: float) -> SchedulingParams:
    """Priority and deadline of ``request``, from now; ``timeout_s`` is the default timeout."""
    priority = _resolve(request, "priority", 0)
    return SchedulingParams(priority, time.time() + _resolve(request, "timeout", timeout_s))


def resolve_flow(
    request: GenerationRequest, max_side: int, defaults: FlowDefaults, size: tuple[int, int] | None = None
) -> FlowSettings:
    """``request``'s flow settings with defaults filled in and every range checked.

    Args:
        max_side: longest side in pixels that the checkpoint's position table covers.
        size: (height, width) to use if the request names neither side.

    Raises:
        InvalidRequest: names the field, its value and what is allowed.
    """
    height, width = _sides(request, defaults.side, max_side, size)
    low, high = defaults.cfg_interval if request.cfg_interval is None else request.cfg_interval
    allowed = REQUEST_FIELDS["cfg_interval"].allowed
    _require("cfg_interval", [low, high], 0 <= low <= high <= 1, allowed)
    return FlowSettings(
        height=height,
        width=width,
        num_inference_steps=_resolve(request, "num_inference_steps", defaults.num_inference_steps),
        seed=resolve_seed(request),
        timestep_shift=_resolve(request, "timestep_shift", defaults.timestep_shift),
        cfg_text_scale=_resolve(request, "cfg_text_scale", defaults.cfg_text_scale),
        cfg_img_scale=_resolve(request, "cfg_img_scale", defaults.cfg_img_scale),
        cfg_interval=(low, high),
        cfg_renorm_type=_resolve(request, "cfg_renorm_type", defaults.cfg_renorm_type),
        cfg_renorm_min=_resolve(request, "cfg_renorm_min", defaults.cfg_renorm_min),
        num_images=resolve_n(request),
        cache=_resolve(request, "cache", "none"),
        partial_images=_resolve(request, "partial_images", 0),
    )


def resolve_decoding(request: GenerationRequest, first_token: int, wanted: Modality, vocab_size: int) -> Decoding:
    """Decoding settings of ``request``'s text: its answer, or its thinking before an image.

    Raises:
        InvalidRequest: names the field, its value and what is allowed.
    """
    thinking = wanted == "image"
    think_tokens = _resolve(request, "max_think_tokens", TEXT.max_think_tokens) if request.think else None
    top_p, min_p = _resolve(request, "top_p", 1.0), _resolve(request, "min_p", 0.0)
    top_k = 0 if request.top_k is None else request.top_k
    _require("top_k", top_k, top_k >= -1, REQUEST_FIELDS["top_k"].allowed)
    nucleus = request.top_p is not None or top_k > 0 or min_p > 0
    temperature = _resolve(request, "temperature", TEXT.temperature_with_nucleus if nucleus else 0.0)
    if top_p == 0:  # the most probable token alone reaches it
        temperature, top_p = 0.0, 1.0
    stop = () if thinking or request.stop is None else request.stop
    _require("stop", list(stop), len(stop) <= MAX_STOPS and all(stop), REQUEST_FIELDS["stop"].allowed)
    base = resolve_seed(request)
    limit = think_tokens or TEXT.max_think_tokens if thinking else _resolve(request, "max_tokens", TEXT.max_tokens)
    least = 0 if thinking else limit if request.ignore_eos else _resolve(request, "min_tokens", 0)
    return Decoding(
        purpose="think" if thinking else "answer",
        first_token=first_token,
        max_new_tokens=limit,
        min_new_tokens=least,
        temperature=temperature if temperature >= MIN_TEMPERATURE else 0.0,
        top_p=top_p,
        top_k=max(top_k, 0),
        min_p=min_p,
        repetition_penalty=_resolve(request, "repetition_penalty", 1.0),
        frequency_penalty=_resolve(request, "frequency_penalty", 0.0),
        presence_penalty=_resolve(request, "presence_penalty", 0.0),
        logit_bias=_logit_bias(request, vocab_size),
        top_logprobs=None if thinking or request.top_logprobs is None else _resolve(request, "top_logprobs", 0),
        stop=stop,
        seeds=(base,) if thinking else tuple(range(base, base + resolve_n(request))),
        split_thinking=bool(request.think),
        max_think_tokens=None if thinking else think_tokens,
    )


def _logit_bias(request: GenerationRequest, vocab_size: int) -> dict[int, float]:
    bias = dict(request.logit_bias or {})
    _require("logit_bias", f"{len(bias)} tokens", len(bias) <= MAX_BIASED_TOKENS, REQUEST_FIELDS["logit_bias"].allowed)
    for token, value in bias.items():
        _require("logit_bias", token, 0 <= token < vocab_size, f"token ids from 0 to {vocab_size - 1}")
        allowed = REQUEST_FIELDS["logit_bias"].allowed
        _require("logit_bias", {str(token): value}, -MAX_LOGIT_BIAS <= value <= MAX_LOGIT_BIAS, allowed)
    return bias


def _sides(request: GenerationRequest, default: int, max_side: int, size: tuple[int, int] | None) -> tuple[int, int]:
    """Height and width in pixels; one side alone means a square, or with an aspect ratio the other side."""
    height, width, ratio = request.height, request.width, aspect_ratio(request.aspect_ratio)
    usual = size or (min(default, max_side),) * 2
    allowed = f"a multiple of {LATENT_STRIDE} from {LATENT_STRIDE} to {max_side}"
    for name, side in (("height", height), ("width", width)):
        if side is not None:
            _require(name, side, side % LATENT_STRIDE == 0 and LATENT_STRIDE <= side <= max_side, allowed)
    if height is None and width is None:
        if ratio is None:
            return usual
        wide = min(math.sqrt(usual[0] * usual[1] * ratio), max_side, max_side * ratio)
        return _nearest_side(wide / ratio), _nearest_side(wide)
    if height is None:
        assert width is not None
        height = width if ratio is None else _nearest_side(width / ratio)
    elif width is None:
        width = height if ratio is None else _nearest_side(height * ratio)
    if ratio is not None:
        given = " and ".join(
            f"{name}={side}" for name, side in (("width", request.width), ("height", request.height)) if side
        )
        agrees = width == _nearest_side(height * ratio) or height == _nearest_side(width / ratio)
        _require("aspect_ratio", request.aspect_ratio, agrees, f"that of {given}, or one of them alone")
        fits = max(height, width) <= max_side
        _require("aspect_ratio", request.aspect_ratio, fits, f"one whose other side is at most {max_side} with {given}")
    return height, width


def aspect_ratio(text: str | None) -> float | None:
    """Width over height of ``text``, the field ``aspect_ratio``.

    Raises:
        InvalidRequest: it is no ratio.
    """
    if text is None:
        return None
    found = re.fullmatch(ASPECT_RATIO, text)
    _require("aspect_ratio", text, found is not None, REQUEST_FIELDS["aspect_ratio"].allowed)
    assert found is not None
    return float(found[1]) / float(found[2])


def _nearest_side(pixels: float) -> int:
    return max(round(pixels / LATENT_STRIDE), 1) * LATENT_STRIDE


def _resolve(request: GenerationRequest, name: str, default: T) -> T:
    """The value of the field ``name``, checked against its declaration; ``default`` if it is not given."""
    value: Any = getattr(request, name)
    field = REQUEST_FIELDS[name]
    if value is None or value == field.unset:
        return default
    _require(name, value, field.permits(value), field.allowed)
    return value  # type: ignore[no-any-return]


def _require(name: str, value: object, valid: bool, allowed: str) -> None:
    if not valid:
        raise InvalidRequest.value(name, value, allowed)


def utf8(name: str, text: str) -> bytes:
    """``text``, the value of the field ``name``, as UTF-8.

    Raises:
        InvalidRequest: it holds half a character, as arguments of a command line may.
    """
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest.value(name, text, "UTF-8 text") from error
