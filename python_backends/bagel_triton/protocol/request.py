"""The request as a user writes it: its fields, and how they travel through Triton.

The proxy, ``bagel``, ``cfg_expand`` and the clients read this table; none repeats it.
A field that is ``None`` was not given: ``defaults.py`` says what it then means.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt

from bagel_triton.protocol.errors import InvalidRequest, truncate

Array = npt.NDArray[Any]
Arrays = dict[str, Array]  # tensors by name, as Triton carries them


class TextPart(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="text"):
    """A piece of text in a turn."""

    text: str


class ImageRef(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="image"):
    """An image in a turn, by its index in the request's ``image``."""

    index: int


class Turn(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One message of a conversation."""

    role: Literal["system", "user", "assistant"]
    parts: tuple[TextPart | ImageRef, ...]


class GenerationRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One request: ``prompt`` and ``image``, or ``messages`` that refer to ``image``.

    ``prompt`` may come bare, as ``<|im_start|>X<|im_end|>``, or as a chat template's
    output. ``image`` are encoded images (PNG, JPEG, WebP, GIF, BMP).
    """

    prompt: str | None = None
    image: tuple[bytes, ...] | None = None
    messages: tuple[Turn, ...] | None = None
    modality: str | None = None
    negative_prompt: str | None = None
    height: int | None = None
    width: int | None = None
    num_inference_steps: int | None = None
    seed: int | None = None
    n: int | None = None
    cfg_text_scale: float | None = None
    cfg_img_scale: float | None = None
    cfg_interval: tuple[float, float] | None = None
    cfg_renorm_type: str | None = None
    cfg_renorm_min: float | None = None
    timestep_shift: float | None = None
    cache: str | None = None
    think: bool | None = None
    max_think_tokens: int | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    stop: tuple[str, ...] | None = None
    priority: int | None = None
    timeout: float | None = None


class TensorSpec(msgspec.Struct, frozen=True):
    """How a field travels: a Triton datatype, and a length, -1 for any."""

    datatype: str
    length: int = 1

    @property
    def numpy_type(self) -> type[np.generic]:
        """The array type of ``datatype``."""
        return _NUMPY_TYPES[self.datatype]


_NUMPY_TYPES: dict[str, type[np.generic]] = {
    "BYTES": np.object_,
    "BOOL": np.bool_,
    "INT32": np.int32,
    "INT64": np.int64,
    "FP64": np.float64,
}

# Scales are FP64: a float32 4.1 is not the 4.1 that was asked for.
REQUEST_TENSORS: dict[str, TensorSpec] = {
    "prompt": TensorSpec("BYTES"),
    "image": TensorSpec("BYTES", -1),
    "messages": TensorSpec("BYTES"),
    "modality": TensorSpec("BYTES"),
    "negative_prompt": TensorSpec("BYTES"),
    "height": TensorSpec("INT32"),
    "width": TensorSpec("INT32"),
    "num_inference_steps": TensorSpec("INT32"),
    "seed": TensorSpec("INT64"),
    "n": TensorSpec("INT32"),
    "cfg_text_scale": TensorSpec("FP64"),
    "cfg_img_scale": TensorSpec("FP64"),
    "cfg_interval": TensorSpec("FP64", 2),
    "cfg_renorm_type": TensorSpec("BYTES"),
    "cfg_renorm_min": TensorSpec("FP64"),
    "timestep_shift": TensorSpec("FP64"),
    "cache": TensorSpec("BYTES"),
    "think": TensorSpec("BOOL"),
    "max_think_tokens": TensorSpec("INT32"),
    "max_tokens": TensorSpec("INT32"),
    "temperature": TensorSpec("FP64"),
    "top_p": TensorSpec("FP64"),
    "top_k": TensorSpec("INT32"),
    "repetition_penalty": TensorSpec("FP64"),
    "stop": TensorSpec("BYTES", -1),
    "priority": TensorSpec("INT32"),
    "timeout": TensorSpec("FP64"),
}
# Those that the ensemble takes: its config.pbtxt names them.
ENSEMBLE_FIELDS = (
    *("prompt", "negative_prompt", "height", "width", "num_inference_steps", "seed"),
    *("cfg_text_scale", "cfg_img_scale", "cfg_interval", "cfg_renorm_type", "cfg_renorm_min", "timestep_shift"),
    *("cache", "priority", "timeout"),
)
_TURNS: msgspec.json.Decoder[tuple[Turn, ...]] = msgspec.json.Decoder(tuple[Turn, ...])


def to_tensors(request: GenerationRequest) -> Arrays:
    """The given fields as named arrays; a field that is ``None`` is left out.

    Raises:
        InvalidRequest: an integer does not fit its tensor type, or a text is not Unicode.
    """
    arrays: Arrays = {}
    for name, spec in REQUEST_TENSORS.items():
        value = getattr(request, name)
        if value is None:
            continue
        if name == "messages":
            value = msgspec.json.encode(value)
        items = list(value) if isinstance(value, tuple) else [value]
        if spec.datatype.startswith("INT"):
            info = np.iinfo(spec.numpy_type)  # type: ignore[type-var]
            if not info.min <= value <= info.max:
                raise InvalidRequest.value(name, value, f"an integer that fits {spec.datatype}")
        items = [utf8(name, item) if isinstance(item, str) else item for item in items]
        array = np.empty(len(items), dtype=spec.numpy_type)
        array[:] = items
        arrays[name] = array
    return arrays


def utf8(name: str, text: str) -> bytes:
    """The bytes of the field ``name``'s ``text``.

    Raises:
        InvalidRequest: it holds half a character, as arguments of a command line may.
    """
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest.value(name, text, "UTF-8 text") from error


def from_tensors(arrays: Arrays) -> GenerationRequest:
    """The request in named arrays, lengths and text encodings checked.

    Raises:
        InvalidRequest: a wrong number of elements, text that is not UTF-8, malformed messages.
    """
    fields: dict[str, Any] = {}
    for name, array in arrays.items():
        spec = REQUEST_TENSORS[name]
        if spec.length not in (-1, array.size):
            raise InvalidRequest.value(name, f"{array.size} elements", f"shape [{spec.length}]")
        items = [_item(name, item) for item in array.reshape(-1).tolist()]
        fields[name] = items[0] if spec.length == 1 else tuple(items)
    if "messages" in fields:
        try:
            fields["messages"] = _TURNS.decode(fields["messages"])
        except msgspec.DecodeError as error:
            shape = f"a list of turns as JSON ({truncate(str(error))})"
            raise InvalidRequest.value("messages", fields["messages"], shape) from error
    return GenerationRequest(**fields)


def _item(name: str, item: Any) -> Any:
    if isinstance(item, bytes) and name != "image":
        try:
            return item.decode()
        except UnicodeDecodeError as error:
            raise InvalidRequest.value(name, item, f"UTF-8 text (byte {error.start} is none)") from error
    return item
