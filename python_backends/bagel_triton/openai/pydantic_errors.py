"""Pydantic's findings as the errors that clients receive: field, value, and what is allowed."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from bagel_triton.protocol.errors import InvalidRequest, format_value

_Context = Mapping[str, Any]
_UNKNOWN_FIELD, _NOOP_FIELD = "unknown_field", "noop_field"
_TYPES = {
    "bool_type": "true or false",
    "finite_number": "a finite number",
    "float_type": "a number",
    "int_type": "an integer",
    "list_type": "a list",
    "model_attributes_type": "an object",
    "model_type": "an object",
    "dict_type": "an object",
    "mapping_type": "an object",
    "string_type": "a text",
    "string_unicode": "a text of whole Unicode characters",
    "tuple_type": "a list",
}
_RULES: dict[str, Callable[[_Context], str]] = {
    "literal_error": lambda context: context["expected"],
    "not_allowed": lambda context: context["allowed"],
    "too_long": lambda context: f"at most {context['max_length']} elements",
    "too_short": lambda context: f"at least {context['min_length']} elements",
    "union_tag_invalid": lambda context: context["expected_tags"],
}


def not_allowed(allowed: str) -> PydanticCustomError:
    """The error of a validator, with the values it accepts."""
    return PydanticCustomError("not_allowed", "not allowed", {"allowed": allowed})


def unknown_field(name: str, known: list[str]) -> PydanticCustomError:
    """The error of a model for a field ``name`` that is not among the ``known``."""
    return PydanticCustomError(_UNKNOWN_FIELD, "unknown field", {"name": name, "known": known})


def noop_field(name: str, value: Any, noop: Sequence[Any], instead: str) -> PydanticCustomError:
    """The error of a model for a field ``name`` that is accepted only with a value of ``noop``."""
    allowed = " or ".join(json.dumps(member) for member in noop)
    context = {"name": name, "value": value, "allowed": f"{allowed}; {instead}" if allowed else instead}
    return PydanticCustomError(_NOOP_FIELD, "not supported", context)


def to_invalid_request(error: ValidationError) -> InvalidRequest:
    """The first finding of ``error`` as the error a client receives."""
    finding = error.errors(include_url=False)[0]
    kind, location, context = finding["type"], _untagged(finding["loc"]), finding.get("ctx", {})
    if kind == "json_invalid":
        return InvalidRequest(f"the body is not JSON: {context['error']}")
    if kind == _UNKNOWN_FIELD:
        name = context["name"]
        return InvalidRequest.unknown(path((*location, name)), name, sorted(context["known"]))
    if kind == _NOOP_FIELD:
        name = path((*location, context["name"]))
        shown = format_value(context["value"])
        return InvalidRequest(f"{name}={shown} is not supported; allowed: {context['allowed']}", name)
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        location = (*location, "type")
    if kind == "missing" and isinstance(location[-1], int):  # an element, and the input is the list
        return InvalidRequest.value(path(location[:-1]), finding["input"], f"at least {location[-1] + 1} elements")
    param = path(location)
    if kind in ("missing", "union_tag_not_found"):
        return InvalidRequest(f"{param} is required", param)
    if not location:
        return InvalidRequest.value("body", finding["input"], "a JSON object")
    return InvalidRequest.value(param, _value(finding), _allowed(finding))


def path(location: tuple[int | str, ...]) -> str:
    """``("messages", 0, "role")`` as ``messages[0].role``."""
    text = ""
    for step in location:
        text += f"[{step}]" if isinstance(step, int) else f".{step}" if text else step
    return text


_UNIONS = ("content", "input")  # lists of tagged unions


def _untagged(location: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """``location`` without the names of unions' members, which pydantic puts after an element's index."""
    return tuple(
        step
        for at, step in enumerate(location)
        if at < 2 or not (isinstance(location[at - 1], int) and location[at - 2] in _UNIONS)
    )


def _value(finding: ErrorDetails) -> object:
    return finding["ctx"]["tag"] if finding["type"] == "union_tag_invalid" else finding["input"]


def _allowed(finding: ErrorDetails) -> str:
    kind = finding["type"]
    if kind in _TYPES:
        return _TYPES[kind]
    return _RULES[kind](finding["ctx"]) if kind in _RULES else finding["msg"]
