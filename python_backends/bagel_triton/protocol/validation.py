"""What a request means where it says nothing, and what it may say: every default and limit.

A checkpoint's own limit, the longest side, is passed in; everything else is here.
"""

from __future__ import annotations

import secrets
import time
from typing import Literal, TypeVar, get_args

import msgspec

from bagel_triton.protocol.errors import InvalidRequest
from bagel_triton.protocol.messages import (
    LATENT_STRIDE,
    MAX_NEW_TOKENS,
    MAX_RESULTS,
    MAX_SCALE,
    MAX_SHIFT,
    MAX_STEPS,
    MIN_SHIFT,
    MIN_STEPS,
    Decoding,
    FlowSettings,
    SchedulingParams,
)
from bagel_triton.protocol.request import GenerationRequest, TextPart, utf8

T = TypeVar("T")
Renorm = Literal["global", "channel", "text_channel"]
Cache = Literal["none", "taylorseer"]
Modality = Literal["image", "text"]
MAX_SEED = 2**63 - 1 - 16  # room for the seeds of further images
MAX_INPUT_IMAGES, MAX_IMAGE_BYTES = 10, 32 * 2**20  # a request's, and an encoded one's
MAX_STOPS, MAX_PRIORITY, MAX_TIMEOUT_S = 16, 1000, 86400
MAX_MESSAGES = 2048  # of a conversation, and parts of a message
MAX_TEXT_BYTES = 2**20  # of all texts of a request, UTF-8: tokenising more takes seconds
LEAST_TEMPERATURE = 1e-5  # below it, float32 scores could overflow and sampling is greedy anyway
LEAST_PENALTY, MAX_PENALTY = 0.01, 2


class FlowDefaults(msgspec.Struct, frozen=True):
    """Values of the image fields a request leaves out."""

    side: int = 512
    num_inference_steps: int = 50
    cfg_text_scale: float = 4.0
    cfg_img_scale: float = 1.5
    cfg_interval: tuple[float, float] = (0.4, 1.0)
    cfg_renorm_type: Renorm = "global"
    cfg_renorm_min: float = 0.0
    timestep_shift: float = 3.0


TEXT2IMG = FlowDefaults()
# The model authors' own settings for editing.
IMG2IMG = FlowDefaults(cfg_img_scale=2.0, cfg_interval=(0.0, 1.0), cfg_renorm_type="text_channel")


class TextDefaults(msgspec.Struct, frozen=True):
    """Values of the text fields a request leaves out; greedy without a temperature."""

    max_tokens: int = 2048
    max_think_tokens: int = 1000
    temperature_with_nucleus: float = 1.0  # where only top_p or top_k asks for sampling


TEXT = TextDefaults()
GUIDANCE_FIELDS = ("cfg_text_scale", "cfg_img_scale", "cfg_interval", "cfg_renorm_type", "cfg_renorm_min")
FLOW_FIELDS = ("height", "width", "num_inference_steps", "timestep_shift", "cache")
IMAGE_FIELDS = ("negative_prompt", *FLOW_FIELDS, *GUIDANCE_FIELDS)
TEXT_FIELDS = ("max_tokens", "stop")
SAMPLING_FIELDS = ("temperature", "top_p", "top_k", "repetition_penalty")


def modality(request: GenerationRequest) -> Modality:
    """What the request wants; fields of the other modality are refused.

    Raises:
        InvalidRequest: an unknown modality, or a field that means nothing for this one.
    """
    wanted = _given(request.modality, "image")
    _check("modality", wanted, wanted in get_args(Modality), ", ".join(get_args(Modality)))
    fields, other = (TEXT_FIELDS, "text") if wanted == "image" else (IMAGE_FIELDS, "image")
    foreign = dict.fromkeys(fields, f"only with {other} output")
    if not request.think:
        if wanted == "image":
            foreign |= dict.fromkeys(SAMPLING_FIELDS, "only with text output or with think")
        foreign["max_think_tokens"] = "only with think"
    for name, allowed in foreign.items():
        if (value := getattr(request, name)) is not None:
            raise InvalidRequest.meaningless(name, value, f"for {wanted} output", allowed)
    return wanted  # type: ignore[return-value]


def bounded(request: GenerationRequest) -> None:
    """Refuse more messages and text than is worth tokenising to find that no context holds them.

    Raises:
        InvalidRequest: names the field that holds most of it.
    """
    turns = request.messages or ()
    _check("messages", f"{len(turns)} messages", len(turns) <= MAX_MESSAGES, f"at most {MAX_MESSAGES}")
    written = (part.text for turn in turns for part in turn.parts if isinstance(part, TextPart))
    sizes = {
        "prompt": len(utf8("prompt", request.prompt or "")),
        "messages": sum(len(utf8("messages", text)) for text in written),
        "negative_prompt": len(utf8("negative_prompt", request.negative_prompt or "")),
        "stop": sum(len(utf8("stop", text)) for text in request.stop or ()),
    }
    total, most = sum(sizes.values()), max(sizes, key=lambda name: sizes[name])
    _check(most, f"{total} bytes of text in all", total <= MAX_TEXT_BYTES, f"at most {MAX_TEXT_BYTES} in a request")


def count(request: GenerationRequest) -> int:
    """Images or answers wanted."""
    number = _given(request.n, 1)
    _check("n", number, 1 <= number <= MAX_RESULTS, f"an integer from 1 to {MAX_RESULTS}")
    return number


def seed(request: GenerationRequest) -> int:
    """The request's seed, drawn where it has none."""
    value = secrets.randbits(31) if request.seed is None else request.seed
    _check("seed", value, 0 <= value <= MAX_SEED, f"an integer from 0 to {MAX_SEED}")
    return value


def schedule(request: GenerationRequest, timeout_s: float) -> SchedulingParams:
    """When ``request`` is worked on, from now; ``timeout_s`` where it names no time itself."""
    priority = _given(request.priority, 0)
    allowed = f"an integer from {-MAX_PRIORITY} to {MAX_PRIORITY}; lower comes first"
    _check("priority", priority, -MAX_PRIORITY <= priority <= MAX_PRIORITY, allowed)
    timeout = _given(request.timeout, timeout_s)
    _check("timeout", timeout, 0 < timeout <= MAX_TIMEOUT_S, f"seconds above 0, at most {MAX_TIMEOUT_S}")
    return SchedulingParams(priority, time.time() + timeout)


def flow_settings(
    request: GenerationRequest, max_side: int, defaults: FlowDefaults, size: tuple[int, int] | None = None
) -> FlowSettings:
    """``request``'s flow settings with defaults filled in and every range checked.

    Args:
        max_side: longest side in pixels that the checkpoint's position table covers.
        size: (height, width) to use where the request names neither side.

    Raises:
        InvalidRequest: names the field, its value and what is allowed.
    """
    height, width = _sides(request, defaults.side, max_side, size)
    steps = _given(request.num_inference_steps, defaults.num_inference_steps)
    _check("num_inference_steps", steps, MIN_STEPS <= steps <= MAX_STEPS, f"an integer from {MIN_STEPS} to {MAX_STEPS}")
    text_scale = _given(request.cfg_text_scale, defaults.cfg_text_scale)
    image_scale = _given(request.cfg_img_scale, defaults.cfg_img_scale)
    for name, scale in (("cfg_text_scale", text_scale), ("cfg_img_scale", image_scale)):
        _check(
            name, scale, 0 <= scale <= MAX_SCALE, f"a number from 0 to {MAX_SCALE} (at most 1 switches guidance off)"
        )
    low, high = _given(request.cfg_interval, defaults.cfg_interval)
    _check("cfg_interval", [low, high], 0 <= low <= high <= 1, "[low, high] with 0 <= low <= high <= 1")
    renorm = _given(request.cfg_renorm_type, defaults.cfg_renorm_type)
    _check("cfg_renorm_type", renorm, renorm in get_args(Renorm), ", ".join(get_args(Renorm)))
    floor = _given(request.cfg_renorm_min, defaults.cfg_renorm_min)
    _check("cfg_renorm_min", floor, 0 <= floor <= 1, "a number from 0 to 1")
    shift = _given(request.timestep_shift, defaults.timestep_shift)
    _check("timestep_shift", shift, MIN_SHIFT <= shift <= MAX_SHIFT, f"a number from {MIN_SHIFT} to {MAX_SHIFT}")
    cache = _given(request.cache, "none")
    _check("cache", cache, cache in get_args(Cache), ", ".join(get_args(Cache)))
    return FlowSettings(
        height=height,
        width=width,
        num_inference_steps=steps,
        seed=seed(request),
        timestep_shift=shift,
        cfg_text_scale=text_scale,
        cfg_img_scale=image_scale,
        cfg_interval=(low, high),
        cfg_renorm_type=renorm,  # type: ignore[arg-type]
        cfg_renorm_min=floor,
        num_images=count(request),
        cache=cache,  # type: ignore[arg-type]
    )


def decoding(request: GenerationRequest, first_token: int, wanted: Modality) -> Decoding:
    """How ``request``'s text is decoded: its answer, or its thinking before an image.

    Raises:
        InvalidRequest: names the field, its value and what is allowed.
    """
    think_tokens = _given(request.max_think_tokens, TEXT.max_think_tokens)
    tokens = _given(request.max_tokens, TEXT.max_tokens)
    for name, value in (("max_think_tokens", think_tokens), ("max_tokens", tokens)):
        _check(name, value, 1 <= value <= MAX_NEW_TOKENS, f"an integer from 1 to {MAX_NEW_TOKENS}")
    top_p, top_k = _given(request.top_p, 1.0), _given(request.top_k, 0)
    _check("top_p", top_p, 0 < top_p <= 1, "a number above 0, at most 1")
    _check("top_k", top_k, top_k >= -1, "an integer >= 1, or 0 or -1 for no limit")
    nucleus = request.top_p is not None or top_k > 0
    temperature = _given(request.temperature, TEXT.temperature_with_nucleus if nucleus else 0.0)
    _check("temperature", temperature, 0 <= temperature <= 2, "a number from 0 (greedy) to 2")
    temperature = temperature if temperature >= LEAST_TEMPERATURE else 0.0
    penalty = _given(request.repetition_penalty, 1.0)
    allowed = f"a number from {LEAST_PENALTY} to {MAX_PENALTY}"
    _check("repetition_penalty", penalty, LEAST_PENALTY <= penalty <= MAX_PENALTY, allowed)
    stop = _given(request.stop, ())
    _check("stop", list(stop), len(stop) <= MAX_STOPS and all(stop), f"at most {MAX_STOPS} texts, none empty")
    number = count(request)
    if wanted == "text" and number > 1 and not temperature:
        raise InvalidRequest.value("n", number, "1 without sampling: greedy answers are all the same; set temperature")
    base = seed(request)
    thinking = wanted == "image"
    return Decoding(
        purpose="think" if thinking else "answer",
        first_token=first_token,
        max_new_tokens=think_tokens if thinking else tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=max(top_k, 0),
        repetition_penalty=penalty,
        stop=stop,
        seeds=(base,) if thinking else tuple(range(base, base + number)),
        split_thinking=bool(request.think),
        max_think_tokens=think_tokens if request.think and not thinking else None,
    )


def _sides(request: GenerationRequest, default: int, max_side: int, size: tuple[int, int] | None) -> tuple[int, int]:
    """Height and width in pixels; one side alone means a square."""
    if request.height is None and request.width is None:
        height, width = size or (min(default, max_side),) * 2
    else:
        height = request.height if request.height is not None else request.width  # type: ignore[assignment]
        width = request.width if request.width is not None else request.height  # type: ignore[assignment]
    allowed = f"a multiple of {LATENT_STRIDE} from {LATENT_STRIDE} to {max_side}"
    given = [name for name in ("height", "width") if getattr(request, name) is not None] or ["height", "width"]
    for name, side in (("height", height), ("width", width)):
        if name not in given:
            continue
        _check(name, side, side % LATENT_STRIDE == 0 and LATENT_STRIDE <= side <= max_side, allowed)
    return height, width


def _given(value: T | None, default: T) -> T:
    return default if value is None else value


def _check(name: str, value: object, valid: bool, allowed: str) -> None:
    if not valid:
        raise InvalidRequest.value(name, value, allowed)
