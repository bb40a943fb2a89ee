"""The body of a chat request, as strict pydantic models.

The generation fields come from :class:`bagel_triton.protocol.request.GenerationRequest`: a field
added there is accepted here, at top level and inside ``extra_body``. Ranges are not
checked here: ``cfg_expand`` owns them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Strict,
    ValidationError,
    create_model,
    model_validator,
)

from bagel_triton.openai.errors import not_allowed, to_invalid_request, unknown_field
from bagel_triton.protocol.errors import InvalidRequest, truncate
from bagel_triton.protocol.request import FIELD_ALIASES, FIELD_TYPES, MAX_STOPS
from bagel_triton.protocol.validation import MAX_MESSAGES


class StrictModel(BaseModel):
    """No coercion, no NaN, and unknown fields are refused with the names of the known."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _only_known_fields(cls, value: Any) -> Any:
        if isinstance(value, dict):
            for name in value:
                if name not in cls.model_fields:
                    raise unknown_field(name, [known for known in cls.model_fields if known not in NEUTRAL])
        return value


class TextPart(StrictModel):
    """A text part of a message."""

    type: Literal["text"]
    text: str


class ImageUrl(StrictModel):
    """Where an image is."""

    url: str


class ImagePart(StrictModel):
    """An image part of a message; ``seed`` is there where a reply is sent back as it came."""

    type: Literal["image_url"]
    image_url: ImageUrl
    seed: int | None = None


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


def _to_parts(content: Any) -> Any:
    """A plain text is a list of one text part."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise not_allowed("a text or a list of parts")
    return content


class ChatMessage(StrictModel):
    """One message; ``content`` is a list of parts however it was written.

    ``reasoning_content`` is there where a reply is sent back as it came: what was thought
    in an earlier turn is no part of the conversation.
    """

    role: Literal["user", "system", "assistant", "developer"]
    content: Annotated[list[Part], Field(max_length=MAX_MESSAGES, fail_fast=True), BeforeValidator(_to_parts)]
    reasoning_content: str | None = None


class StreamOptions(StrictModel):
    """What a streamed reply carries besides its deltas."""

    include_usage: bool | None = None


MAX_MODALITIES = 8  # more than there are
_CONVERSATION = ("prompt", "image", "messages", "modality")  # made of the body's messages and modalities


def _json_type(annotation: Any) -> Any:
    """JSON has no tuples and no integers as names: a list and a number's text are taken in their place."""
    members = [Annotated[kind, Strict(False)] if get_origin(kind) is tuple else kind for kind in get_args(annotation)]
    if get_origin(members[0]) is Mapping:
        members[0] = dict[Annotated[int, Strict(False)], float]
    return Union[tuple(members)]  # noqa: UP007 - built from a sequence


def _to_texts(stop: Any) -> Any:
    """A plain text is a list of one text."""
    if isinstance(stop, str):
        return [stop]
    if stop is not None and not isinstance(stop, list):
        raise not_allowed("a text or a list of texts")
    if stop is not None and len(stop) > MAX_STOPS:  # before each of them is looked at
        raise not_allowed(f"at most {MAX_STOPS} texts")
    return stop


def _field_type(name: str, annotation: Any) -> Any:
    json_type = _json_type(annotation)
    return Annotated[json_type, BeforeValidator(_to_texts)] if name == "stop" else json_type


NEUTRAL: dict[str, Any] = {
    "logprobs": False,
    "metadata": {},
    "response_format": {"type": "text"},
    "store": False,
    "tool_choice": "none",
    "tools": [],
}


def _only(neutral: Any) -> Callable[[Any], Any]:
    def check(value: Any) -> Any:
        if value is None or (value == neutral and isinstance(value, bool) == isinstance(neutral, bool)):
            return value
        raise not_allowed(json.dumps(neutral))

    return check


NEUTRAL_FIELDS: dict[str, Any] = {
    name: (Annotated[Any, BeforeValidator(_only(value))], None) for name, value in NEUTRAL.items()
}


_GENERATION_FIELDS: dict[str, Any] = {
    name: (_field_type(name, annotation), None) for name, annotation in FIELD_TYPES.items() if name not in _CONVERSATION
}
_GENERATION_FIELDS |= {alias: _GENERATION_FIELDS[name] for alias, name in FIELD_ALIASES.items()}
if TYPE_CHECKING:

    class GenerationFields(StrictModel):
        """The fields of ``GenerationRequest`` except those that say the conversation."""

    class _OpenAIFields(GenerationFields):
        """And those that may only ask for nothing."""
else:
    GenerationFields = create_model("GenerationFields", __base__=StrictModel, **_GENERATION_FIELDS)
    _OpenAIFields = create_model("OpenAIFields", __base__=GenerationFields, **NEUTRAL_FIELDS)


class ChatBody(_OpenAIFields):
    """A request body; ``null`` means not given, as in OpenAI's API."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    model: str | None = None
    modalities: Annotated[list[str], Field(max_length=MAX_MODALITIES, fail_fast=True)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    extra_body: GenerationFields | None = None

    def generation_fields(self) -> tuple[dict[str, Any], dict[str, str]]:
        """The given fields of ``GenerationRequest``, and how those are written whose name differs here.

        Raises:
            InvalidRequest: a field is given twice, by another name or in ``extra_body``.
        """
        fields: dict[str, Any] = {}
        written: dict[str, str] = {}
        for prefix, source in (("", self), ("extra_body.", self.extra_body)):
            for alias in _GENERATION_FIELDS:
                name = FIELD_ALIASES.get(alias, alias)
                value = getattr(source, alias, None)
                if value is None or value in ((), {}):
                    continue
                if name in fields:
                    raise InvalidRequest(
                        f"{written[name]} and {prefix}{alias} are both given; allowed: one of them", f"{prefix}{alias}"
                    )
                fields[name], written[name] = value, f"{prefix}{alias}"
        return fields, {name: text for name, text in written.items() if text != name}


def parse(data: bytes) -> ChatBody:
    """The body in JSON ``data``, every field's type checked.

    Raises:
        InvalidRequest: not JSON, not an object, an unknown field, one that is there twice, or a wrong type.
    """
    try:
        body = ChatBody.model_validate_json(data)
    except ValidationError as error:
        raise to_invalid_request(error) from error
    json.loads(data.decode(), object_pairs_hook=_refuse_twins)  # pydantic takes the last one
    if body.stream_options is not None and not body.stream:
        given = body.stream_options.model_dump(exclude_unset=True)
        raise InvalidRequest.meaningless("stream_options", given, "without stream", "only with stream=true")
    return body


def _refuse_twins(members: list[tuple[str, Any]]) -> None:
    names = [name for name, _ in members]
    if len(set(names)) == len(names):
        return
    twin = next(name for at, name in enumerate(names) if name in names[:at])
    raise InvalidRequest(f"{truncate(twin)} is given {names.count(twin)} times in one object; allowed: once", twin)


# The one value of each, besides null, that asks for nothing.
