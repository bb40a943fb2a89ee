"""A request as named arrays, the form in which Triton carries it, and back."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from bagel_triton.protocol.errors import InvalidRequest, truncate
from bagel_triton.protocol.request import REQUEST_FIELDS, GenerationRequest, Turn
from bagel_triton.protocol.validation import utf8

Array = npt.NDArray[Any]
Arrays = dict[str, Array]  # tensors by name
# Fields that travel as JSON in one BYTES element.
_JSON: dict[str, msgspec.json.Decoder[Any]] = {
    "messages": msgspec.json.Decoder(tuple[Turn, ...]),
    "logit_bias": msgspec.json.Decoder(dict[int, float]),
}


def to_tensors(request: GenerationRequest) -> Arrays:
    """The given fields as named arrays; a field that is ``None`` is left out.

    Raises:
        InvalidRequest: an integer does not fit its tensor type, or a text is not Unicode.
    """
    arrays: Arrays = {}
    for name, field in REQUEST_FIELDS.items():
        value = getattr(request, name)
        if value is None:
            continue
        if name in _JSON:
            value = msgspec.json.encode(value)
        items = list(value) if isinstance(value, tuple) else [value]
        if field.datatype.startswith("INT"):
            info = np.iinfo(field.numpy_type)  # type: ignore[type-var]
            if not info.min <= value <= info.max:
                raise InvalidRequest.value(name, value, f"an integer that fits {field.datatype}")
        items = [utf8(name, item) if isinstance(item, str) else item for item in items]
        array = np.empty(len(items), dtype=field.numpy_type)
        array[:] = items
        arrays[name] = array
    return arrays


def from_tensors(arrays: Arrays) -> GenerationRequest:
    """The request in named arrays, lengths and text encodings checked.

    Raises:
        InvalidRequest: a wrong number of elements, text that is not UTF-8, malformed JSON.
    """
    fields: dict[str, Any] = {}
    for name, array in arrays.items():
        field = REQUEST_FIELDS[name]
        if field.length not in (-1, array.size):
            raise InvalidRequest.value(name, f"{array.size} elements", f"shape [{field.length}]")
        items = [_item(name, item) for item in array.reshape(-1).tolist()]
        fields[name] = items[0] if field.length == 1 else tuple(items)
    for name in _JSON.keys() & fields.keys():
        try:
            fields[name] = _JSON[name].decode(fields[name])
        except msgspec.DecodeError as error:
            allowed = f"{REQUEST_FIELDS[name].limits} ({truncate(str(error))})"
            raise InvalidRequest.value(name, fields[name], allowed) from error
    return GenerationRequest(**fields)


def _item(name: str, item: Any) -> Any:
    if isinstance(item, bytes) and name != "image":
        try:
            return item.decode()
        except UnicodeDecodeError as error:
            raise InvalidRequest.value(name, item, f"UTF-8 text (byte {error.start} is not)") from error
    return item
