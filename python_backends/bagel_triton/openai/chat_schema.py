"""The body of a chat request."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BeforeValidator,
    Field,
    PrivateAttr,
    ValidationError,
)

from bagel_triton.openai.errors import not_allowed, to_invalid_request
from bagel_triton.openai.schema import (
    FIELD_NAMES,
    BodyFields,
    Effort,
    GivenFields,
    StrictModel,
    Switch,
    thinks,
    to_object,
)
from bagel_triton.protocol.errors import InvalidRequest, truncate
from bagel_triton.protocol.request import MAX_INPUT_IMAGES
from bagel_triton.protocol.validation import MAX_MESSAGES

MAX_MODALITIES = 8  # more than there are


class TextPart(StrictModel):
    """A text part of a message."""

    place: ClassVar[str] = "part"
    type: Literal["text"]
    text: str


class RefusalPart(StrictModel):
    """A refusal of an earlier answer, which is text like any other."""

    place: ClassVar[str] = "part"
    type: Literal["refusal"]
    refusal: str

    @property
    def text(self) -> str:
        """The text of this part."""
        return self.refusal


class ThoughtPart(StrictModel):
    """Earlier thinking, which is no part of the conversation."""

    place: ClassVar[str] = "thought_part"
    type: Literal["thinking", "redacted_thinking", "reasoning"]


class ImageUrl(StrictModel):
    """The URL of an image."""

    place: ClassVar[str] = "image_url"
    url: str


def _to_image_url(value: Any) -> Any:
    """A plain text is the URL."""
    return {"url": value} if isinstance(value, str) else value


class ImagePart(StrictModel):
    """An image part of a message."""

    place: ClassVar[str] = "part"
    type: Literal["image_url"]
    image_url: Annotated[ImageUrl, BeforeValidator(_to_image_url)]


Part = Annotated[TextPart | ImagePart | RefusalPart | ThoughtPart, Field(discriminator="type")]


def _to_parts(content: Any) -> Any:
    """A plain text is a text part, alone or in a list."""
    if isinstance(content, str):
        content = [content]
    if not isinstance(content, list):
        raise not_allowed("a text or a list of parts")
    return [{"type": "text", "text": part} if isinstance(part, str) else part for part in content]


class ChatMessage(StrictModel):
    """One message; ``content`` is a list of parts however it was written.

    ``images`` are there if a reply is sent back as it came: those that are in ``content`` too
    are the same ones.
    """

    place: ClassVar[str] = "message"
    role: Literal["user", "system", "assistant", "developer"]
    content: Annotated[list[Part], Field(max_length=MAX_MESSAGES, fail_fast=True), BeforeValidator(_to_parts)] = Field(
        []
    )
    images: Annotated[list[ImagePart], Field(max_length=MAX_INPUT_IMAGES, fail_fast=True)] = Field([])


class StreamOptions(StrictModel):
    """Additions to a streamed reply."""

    place: ClassVar[str] = "stream_options"
    include_usage: bool = False
    include_progress: bool = False


class Reasoning(StrictModel):
    """``reasoning`` as OpenRouter's API has it."""

    effort: Effort = None
    enabled: bool | None = None
    max_tokens: int | None = None
    exclude: bool | None = None
    summary: Literal["auto", "concise", "detailed"] | None = Field(None, description="Accepted without effect.")


class UsageOptions(StrictModel):
    """``usage`` as OpenRouter's API has it."""

    include: bool = False


class ChatBody(BodyFields):
    """A request body. The members of ``extra_body`` and ``extra_args`` are read as if they stood beside it."""

    place: ClassVar[str] = "body"
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    model: str | None = None
    modalities: Annotated[list[str], Field(max_length=MAX_MODALITIES, fail_fast=True)] | None = None
    logprobs: bool | None = None
    reasoning: Reasoning | None = None
    include_reasoning: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    usage: UsageOptions | None = None
    image_reply: Literal["list", "images", "both"] | None = None
    _wrapped_in: Mapping[str, str] = PrivateAttr({})  # the object that has a field, for those not beside messages

    @property
    def excludes_reasoning(self) -> bool:
        """Whether the reply leaves the thought out."""
        return self.include_reasoning is False or (self.reasoning is not None and bool(self.reasoning.exclude))

    def generation_fields(self) -> GivenFields:
        """The given fields of ``GenerationRequest``.

        Raises:
            InvalidRequest: a field is given twice, by two names or by two ways to say it.
        """
        given = GivenFields(self.stream)
        for alias, name in FIELD_NAMES.items():
            given.add(name, getattr(self, alias), self.param(alias))
        self.add_sampling(given)
        self.add_sizes(given, self.param)
        for name, alias, value in [*self.thinking_switches(), *self._reasoning_switches()]:
            given.add(name, value, self.param(alias))
        if not self.logprobs:
            given.fields.pop("top_logprobs", None)
        elif "top_logprobs" not in given.fields:
            given.add("top_logprobs", 0, self.param("logprobs"))
        return given

    def param(self, name: str) -> str:
        """``name`` as an error has it: behind the object that it was given in, such as ``extra_body.``."""
        wrapper = self._wrapped_in.get(name.partition(".")[0])
        return name if wrapper is None else f"{wrapper}.{name}"

    def _reasoning_switches(self) -> list[Switch]:
        if self.reasoning is None:
            return []
        enabled, effort, budget = self.reasoning.enabled, self.reasoning.effort, self.reasoning.max_tokens
        switches: list[Switch] = [
            ("think", "reasoning.enabled", enabled),
            ("think", "reasoning.effort", None if effort is None else thinks(effort)),
            ("max_think_tokens", "reasoning.max_tokens", budget),
        ]
        if enabled is None and effort is None and budget:
            switches.append(("think", "reasoning.max_tokens", True))
        return switches


def parse(data: bytes) -> ChatBody:
    """The body in JSON ``data``, every field's type checked.

    Raises:
        InvalidRequest: not JSON, not an object, an unknown field, one that is there twice, or a wrong type.
    """
    body = to_object(data)
    wrapped_in = _unwrap(body)
    try:
        chat = ChatBody.model_validate(body)
    except ValidationError as error:
        raise _as_written(to_invalid_request(error), wrapped_in) from error
    chat._wrapped_in = wrapped_in
    return chat


# Objects whose members are read as if they stood beside it: OpenAI's SDK's, and vLLM-Omni's by its new and old name.
WRAPPERS = ("extra_body", "extra_args", "extra_params")


def _unwrap(body: dict[str, Any]) -> Mapping[str, str]:
    """Put the members of such objects into ``body``; the object that has each of them, by the member's name."""
    wrapped_in: dict[str, str] = {}
    for wrapper in WRAPPERS:  # extra_body may hold the others
        members = body.pop(wrapper, None)
        if members is None:
            continue
        place = f"{wrapped_in.pop(wrapper)}.{wrapper}" if wrapper in wrapped_in else wrapper
        if not isinstance(members, dict):
            raise InvalidRequest.value(place, members, "an object")
        for name, value in members.items():
            if value is None:
                continue
            param = f"{place}.{name}"
            if name in ("messages", wrapper):
                raise InvalidRequest.unknown(param, name, sorted({*ChatBody.model_fields} - {"messages"}))
            if body.get(name) not in (None, value):
                first = f"{wrapped_in[name]}.{name}" if name in wrapped_in else name
                both = f"{truncate(first)} and {truncate(param)} are both given"
                raise InvalidRequest(f"{both}; allowed: one of them", param)
            body[name], wrapped_in[name] = value, place
    return wrapped_in


def _as_written(error: InvalidRequest, wrapped_in: Mapping[str, str]) -> InvalidRequest:
    """``error``, with the name of a field that is inside another object."""
    param = error.param or ""
    root = re.split(r"[.\[]", param, maxsplit=1)[0]
    if root not in wrapped_in:
        return error
    renamed = f"{wrapped_in[root]}.{param}"
    message = error.message
    return type(error)(renamed + message[len(param) :] if message.startswith(param) else message, renamed)
