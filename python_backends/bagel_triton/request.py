"""The request as a user writes it: fields, types, defaults and limits, in one place.

The proxy, ``bagel``, ``cfg_expand`` and the clients read this table; none repeats it.
A field that is ``None`` was not given and takes its default in :func:`resolve_flow`.
"""

from __future__ import annotations

import math
import secrets
from typing import Any, Literal, TypeVar, get_args

import msgspec
import numpy as np
import numpy.typing as npt

from bagel_triton.errors import InvalidRequest
from bagel_triton.messages import FlowSettings

T = TypeVar("T")
Array = npt.NDArray[Any]
Arrays = dict[str, Array]  # tensors by name, as Triton carries them
RenormType = Literal["global", "channel", "text_channel"]
LATENT_STRIDE = 16  # pixels a latent token covers per side: VAE stride 8, patches of 2
MIN_STEPS, MAX_STEPS = 2, 1000
MAX_SEED = 2**63 - 1


class GenerationRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One request; ``prompt`` may come bare or as ``<|im_start|>X<|im_end|>``."""

    prompt: str
    negative_prompt: str | None = None
    height: int | None = None
    width: int | None = None
    num_inference_steps: int | None = None
    seed: int | None = None
    cfg_text_scale: float | None = None
    cfg_img_scale: float | None = None
    cfg_interval: tuple[float, float] | None = None
    cfg_renorm_type: str | None = None
    cfg_renorm_min: float | None = None
    timestep_shift: float | None = None


class TensorSpec(msgspec.Struct, frozen=True):
    """How a request field travels through Triton: datatype, shape, and numpy type."""

    datatype: str
    shape: tuple[int, ...]

    @property
    def numpy_type(self) -> type[np.generic]:
        return {"BYTES": np.object_, "INT32": np.int32, "INT64": np.int64, "FP64": np.float64}[self.datatype]


# Scales are FP64: a float32 4.1 is not the 4.1 that was asked for.
REQUEST_TENSORS: dict[str, TensorSpec] = {
    "prompt": TensorSpec("BYTES", (1,)),
    "negative_prompt": TensorSpec("BYTES", (1,)),
    "height": TensorSpec("INT32", (1,)),
    "width": TensorSpec("INT32", (1,)),
    "num_inference_steps": TensorSpec("INT32", (1,)),
    "seed": TensorSpec("INT64", (1,)),
    "cfg_text_scale": TensorSpec("FP64", (1,)),
    "cfg_img_scale": TensorSpec("FP64", (1,)),
    "cfg_interval": TensorSpec("FP64", (2,)),
    "cfg_renorm_type": TensorSpec("BYTES", (1,)),
    "cfg_renorm_min": TensorSpec("FP64", (1,)),
    "timestep_shift": TensorSpec("FP64", (1,)),
}


class TaskDefaults(msgspec.Struct, frozen=True):
    """Values of the fields a request leaves out."""

    side: int = 512
    num_inference_steps: int = 50
    cfg_text_scale: float = 4.0
    cfg_img_scale: float = 1.5
    cfg_interval: tuple[float, float] = (0.4, 1.0)
    cfg_renorm_type: RenormType = "global"
    cfg_renorm_min: float = 0.0
    timestep_shift: float = 3.0


TEXT2IMG_DEFAULTS = TaskDefaults()


def to_tensors(request: GenerationRequest) -> Arrays:
    """The given fields as named arrays; a field that is ``None`` is left out.

    Raises:
        InvalidRequest: an integer does not fit its tensor type.
    """
    arrays: Arrays = {}
    for name, spec in REQUEST_TENSORS.items():
        value = getattr(request, name)
        if value is None:
            continue
        if spec.datatype == "BYTES":
            arrays[name] = np.array([value.encode()], dtype=np.object_)
            continue
        if spec.datatype.startswith("INT"):
            info = np.iinfo(spec.numpy_type)  # type: ignore[type-var]
            if not info.min <= value <= info.max:
                raise InvalidRequest.value(name, value, f"an integer from {info.min} to {info.max}")
        arrays[name] = np.array(value, dtype=spec.numpy_type).reshape(spec.shape)
    return arrays


def from_tensors(arrays: Arrays) -> GenerationRequest:
    """The request in named arrays, shapes and text encodings checked.

    Raises:
        InvalidRequest: a wrong number of elements, text that is not UTF-8, no prompt.
    """
    fields: dict[str, object] = {}
    for name, array in arrays.items():
        spec = REQUEST_TENSORS[name]
        if array.size != math.prod(spec.shape):
            raise InvalidRequest.value(name, f"{array.size} elements", f"shape {list(spec.shape)}")
        values = [_scalar(name, item) for item in array.reshape(-1).tolist()]
        fields[name] = values[0] if spec.shape == (1,) else tuple(values)
    if "prompt" not in fields:
        raise InvalidRequest("prompt is required: a text that is not empty", "prompt")
    return GenerationRequest(**fields)  # type: ignore[arg-type]


def _scalar(name: str, item: object) -> object:
    if isinstance(item, bytes):
        try:
            return item.decode()
        except UnicodeDecodeError as error:
            raise InvalidRequest.value(name, item, "UTF-8 text") from error
    return item


def resolve_flow(request: GenerationRequest, max_side: int, defaults: TaskDefaults) -> FlowSettings:
    """``request``'s flow settings with defaults filled in and every range checked.

    Args:
        max_side: longest side in pixels that the checkpoint's position table covers.

    Raises:
        InvalidRequest: names the field, its value and what is allowed.
    """
    height, width = _sides(request, defaults.side, max_side)
    steps = _given(request.num_inference_steps, defaults.num_inference_steps)
    _check("num_inference_steps", steps, MIN_STEPS <= steps <= MAX_STEPS, f"an integer from {MIN_STEPS} to {MAX_STEPS}")
    seed = secrets.randbits(31) if request.seed is None else request.seed
    _check("seed", seed, 0 <= seed <= MAX_SEED, f"an integer from 0 to {MAX_SEED}")
    text_scale = _given(request.cfg_text_scale, defaults.cfg_text_scale)
    image_scale = _given(request.cfg_img_scale, defaults.cfg_img_scale)
    for name, scale in (("cfg_text_scale", text_scale), ("cfg_img_scale", image_scale)):
        _check(
            name, scale, math.isfinite(scale) and scale >= 0, "a finite number >= 0 (at most 1 switches guidance off)"
        )
    low, high = _given(request.cfg_interval, defaults.cfg_interval)
    _check("cfg_interval", [low, high], 0 <= low <= high <= 1, "[low, high] with 0 <= low <= high <= 1")
    renorm = _given(request.cfg_renorm_type, defaults.cfg_renorm_type)
    _check("cfg_renorm_type", renorm, renorm in get_args(RenormType), ", ".join(get_args(RenormType)))
    floor = _given(request.cfg_renorm_min, defaults.cfg_renorm_min)
    _check("cfg_renorm_min", floor, 0 <= floor <= 1, "a number from 0 to 1")
    shift = _given(request.timestep_shift, defaults.timestep_shift)
    _check("timestep_shift", shift, math.isfinite(shift) and shift > 0, "a finite number > 0")
    return FlowSettings(
        height=height,
        width=width,
        num_inference_steps=steps,
        seed=seed,
        timestep_shift=shift,
        cfg_text_scale=text_scale,
        cfg_img_scale=image_scale,
        cfg_interval=(low, high),
        cfg_renorm_type=renorm,  # type: ignore[arg-type]
        cfg_renorm_min=floor,
    )


def _sides(request: GenerationRequest, default: int, max_side: int) -> tuple[int, int]:
    """Height and width in pixels; one side alone means a square."""
    height = request.height if request.height is not None else request.width
    width = request.width if request.width is not None else request.height
    height, width = _given(height, min(default, max_side)), _given(width, min(default, max_side))
    allowed = f"a multiple of {LATENT_STRIDE} from {LATENT_STRIDE} to {max_side}"
    for name, side in (("height", height), ("width", width)):
        _check(name, side, side % LATENT_STRIDE == 0 and LATENT_STRIDE <= side <= max_side, allowed)
    return height, width


def _given(value: T | None, default: T) -> T:
    return default if value is None else value


def _check(name: str, value: object, valid: bool, allowed: str) -> None:
    if not valid:
        raise InvalidRequest.value(name, value, allowed)
