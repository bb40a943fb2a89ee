"""The body of a request to the Responses API, and the model's request that it becomes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, ValidationError

from bagel_triton.openai.errors import not_allowed, to_invalid_request
from bagel_triton.openai.image_io import Format, ImageUrl
from bagel_triton.openai.images_schema import refuse_mask
from bagel_triton.openai.schema import (
    FIELD_NAMES,
    BodyFields,
    Effort,
    FileFields,
    GivenFields,
    SizeFields,
    StrictModel,
    thinks,
    to_object,
)
from bagel_triton.protocol.errors import InvalidRequest
from bagel_triton.protocol.request import MAX_INPUT_IMAGES, ImageRef, TextPart, Turn
from bagel_triton.protocol.validation import MAX_MESSAGES

IMAGE_TOOL = "image_generation"
# What ``include`` may name: parts of replies that are there anyway or that this model never makes.
Included = Literal[
    "reasoning.encrypted_content",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "file_search_call.results",
    "code_interpreter_call.outputs",
    "web_search_call.results",
    "web_search_call.action.sources",
]


class InputText(StrictModel):
    """Text in a message."""

    place: ClassVar[str] = "input_part"
    type: Literal["input_text", "output_text", "text", "summary_text"]
    text: str


class InputRefusal(StrictModel):
    """A refusal of an earlier answer, which is text like any other."""

    place: ClassVar[str] = "input_part"
    type: Literal["refusal"]
    refusal: str


def _to_url(value: Any) -> Any:
    """A chat part's ``{"url": ...}`` is the URL."""
    return value["url"] if isinstance(value, dict) and "url" in value else value


class InputImage(StrictModel):
    """An image in a message."""

    place: ClassVar[str] = "input_image"
    type: Literal["input_image"]
    image_url: Annotated[str, BeforeValidator(_to_url)]


InputPart = Annotated[InputText | InputRefusal | InputImage, Field(discriminator="type")]


def _to_parts(content: Any) -> Any:
    """A plain text is a list of one part."""
    return [{"type": "input_text", "text": content}] if isinstance(content, str) else content


class InputMessage(StrictModel):
    """A message of the conversation."""

    place: ClassVar[str] = "input_message"
    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Annotated[list[InputPart], Field(max_length=MAX_MESSAGES, fail_fast=True), BeforeValidator(_to_parts)] = (
        Field([])
    )


class InputReasoning(StrictModel):
    """Earlier thinking, which is no part of the conversation."""

    place: ClassVar[str] = "input_reasoning"
    type: Literal["reasoning"]


class InputImageCall(StrictModel):
    """An image that this API made earlier, as its reply had it."""

    place: ClassVar[str] = "input_image_call"
    type: Literal["image_generation_call"]
    result: str | None = None
    output_format: Format = "png"


InputItem = Annotated[InputMessage | InputReasoning | InputImageCall, Field(discriminator="type")]


def _to_items(given: Any) -> Any:
    """A plain text is one user message; an item without a type is a message."""
    if isinstance(given, str):
        if not given.strip():
            raise not_allowed("a text that is not empty, or a list of items")
        return [{"type": "message", "role": "user", "content": given}]
    if not isinstance(given, list):
        raise not_allowed("a text or a list of items")
    return [{"type": "message", **item} if isinstance(item, dict) and "role" in item else item for item in given]


class ImageTool(SizeFields, FileFields):
    """The tool ``image_generation``: its presence makes the answer an image."""

    place: ClassVar[str] = "image_tool"
    type: Literal["image_generation"]
    action: Literal["auto", "generate", "edit"] | None = None
    quality: Literal["auto", "low", "medium", "high", "xhigh", "max"] | None = None
    background: Literal["auto", "opaque"] | None = None


class ReasoningOptions(StrictModel):
    """Whether to think, and the form in which the reply carries the thought."""

    place: ClassVar[str] = "reasoning"
    effort: Effort = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None


class TextFormat(StrictModel):
    """The only format of a text answer there is."""

    place: ClassVar[str] = "text_format"
    type: Literal["text"]


class TextOptions(StrictModel):
    """Options of a text answer."""

    place: ClassVar[str] = "text"
    format: TextFormat | None = None


class ResponseStreamOptions(StrictModel):
    """Options of a stream; none changes it."""

    place: ClassVar[str] = "stream_options"
    include_usage: bool | None = Field(None, description="Accepted without effect: the last event has the usage.")


class ResponsesBody(BodyFields):
    """A request body. ``null`` means not given."""

    place: ClassVar[str] = "responses"
    input: Annotated[
        list[InputItem], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True), BeforeValidator(_to_items)
    ]
    instructions: str | None = None
    model: str | None = None
    max_output_tokens: int | None = None
    reasoning: ReasoningOptions | None = None
    text: TextOptions | None = None
    tools: Annotated[list[ImageTool], Field(max_length=1, fail_fast=True)] = Field([])
    tool_choice: str | dict[str, Any] | None = None
    include: list[Included] | None = Field(None, description="Replies carry all they have already.")
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None

    @property
    def image_tool(self) -> ImageTool | None:
        """The tool, if this request draws; ``tool_choice: "none"`` switches it off."""
        return self.tools[0] if self.tools and self.tool_choice != "none" else None

    @property
    def summarises(self) -> bool:
        """Whether the thought is requested as a summary."""
        return self.reasoning is not None and bool(self.reasoning.summary or self.reasoning.generate_summary)

    def generation_fields(self) -> GivenFields:
        """The given fields of ``GenerationRequest``.

        Raises:
            InvalidRequest: a field is given twice, or ``size`` is no size.
        """
        given, tool = GivenFields(self.stream), self.image_tool
        for prefix, source in (("", self), ("tools[0].", tool)):
            for alias, name in FIELD_NAMES.items():
                given.add(name, getattr(source, alias, None), f"{prefix}{alias}")
        self.add_sampling(given)
        given.add("max_tokens", self.max_output_tokens, "max_output_tokens")
        for name, alias, value in self.thinking_switches():
            given.add(name, value, alias)
        if self.reasoning is not None and self.reasoning.effort is not None:
            given.add("think", thinks(self.reasoning.effort), "reasoning.effort")
        self.add_sizes(given, self.param)
        if tool is not None:
            tool.add_sizes(given, lambda name: f"tools[0].{name}")
        return given

    def conversation(self) -> tuple[tuple[Turn, ...], tuple[ImageUrl, ...], dict[str, str]]:
        """Turns, the images they refer to, and the body's name of each turn's text.

        Raises:
            InvalidRequest: an image where none can be, or too many.
        """
        turns: list[Turn] = []
        images: list[ImageUrl] = []
        written: dict[str, str] = {}

        def add(turn: Turn, param: str) -> None:
            written[f"messages[{len(turns)}].content"] = param
            turns.append(turn)

        def image(url: str, param: str) -> ImageRef:
            images.append(ImageUrl(url, param))
            return ImageRef(len(images) - 1)

        if self.instructions:
            add(Turn("system", (TextPart(self.instructions),)), "instructions")
        for index, item in enumerate(self.input):
            param = f"input[{index}]"
            if isinstance(item, InputImageCall) and item.result:
                url = f"data:image/{item.output_format};base64,{item.result}"
                add(Turn("assistant", (image(url, f"{param}.result"),)), param)
            elif isinstance(item, InputMessage):
                role = "system" if item.role == "developer" else item.role
                parts: list[TextPart | ImageRef] = []
                for place, part in enumerate(item.content):
                    name = f"{param}.content[{place}]"
                    if not isinstance(part, InputImage):
                        parts.append(TextPart(part.text if isinstance(part, InputText) else part.refusal))
                    elif role == "system":
                        allowed = f"'input_text' in a message of role {item.role!r}"
                        raise InvalidRequest.value(f"{name}.type", part.type, allowed)
                    else:
                        parts.append(image(part.image_url, f"{name}.image_url"))
                add(Turn(role, tuple(parts)), f"{param}.content")
        if len(images) > MAX_INPUT_IMAGES:
            raise InvalidRequest.value("input", f"{len(images)} images", f"at most {MAX_INPUT_IMAGES} images")
        return tuple(turns), tuple(images), written


_NO_STATE = "this server keeps no state; send the whole conversation as input"
_STATE = {
    "previous_response_id": _NO_STATE,
    "conversation": _NO_STATE,
    "prompt": "this server keeps no prompts; write it into input or instructions",
    "background": "this server keeps no state; use stream=true for a long request",
}
_NO_LOGPROBS = "use POST /v1/chat/completions with logprobs"


def parse(data: bytes) -> ResponsesBody:
    """The body in JSON ``data``.

    Raises:
        InvalidRequest: names the field that is not allowed, and what to do instead.
    """
    fields = to_object(data)
    for name, advice in _STATE.items():
        if fields.get(name):
            raise InvalidRequest(f"{name} is not supported: {advice}", name)
    _check_format(fields.get("text"))
    _check_tools(fields.get("tools"))
    _check_items(fields.get("input"))
    try:
        body = ResponsesBody.model_validate({name: value for name, value in fields.items() if name not in _STATE})
    except ValidationError as error:
        raise to_invalid_request(error) from error
    _check_fields(body)
    return body


def _check_format(text: Any) -> None:
    """Refuse JSON answers, before the fields of their schema are called unknown."""
    wanted = text.get("format") if isinstance(text, dict) else None
    if isinstance(wanted, dict) and wanted.get("type") != "text":
        allowed = "'text'; ask for JSON in the prompt, and read the answer's text"
        raise InvalidRequest.value("text.format.type", wanted.get("type"), allowed)


def _check_tools(tools: Any) -> None:
    """Refuse other tools by name, before their fields are called unknown."""
    for index, tool in enumerate(tools if isinstance(tools, list) else ()):
        if not isinstance(tool, dict):
            continue
        kind = tool.get("type")
        if kind != IMAGE_TOOL:
            raise InvalidRequest.value(f"tools[{index}].type", kind, f"'{IMAGE_TOOL}', the only tool of this model")
        if tool.get("input_image_mask") is not None:
            raise refuse_mask(f"tools[{index}].input_image_mask")


def _check_items(items: Any) -> None:
    """Refuse items that refer to what this server does not keep or the model does not do."""
    for index, item in enumerate(items if isinstance(items, list) else ()):
        if not isinstance(item, dict):
            continue
        kind = item.get("type", "message" if "role" in item else None)
        if kind == "item_reference":
            raise InvalidRequest(f"input[{index}] is an item_reference: {_NO_STATE}", f"input[{index}].type")
        if isinstance(kind, str) and (kind.endswith(("_call", "_call_output")) and kind != "image_generation_call"):
            message = f"input[{index}].type={kind!r} is not supported: this model calls no tools; write results as text"
            raise InvalidRequest(message, f"input[{index}].type")
        for place, part in enumerate(_parts_of(item)):
            param = f"input[{index}].content[{place}]"
            if part.get("type") == "input_file" or part.get("file_id"):
                raise InvalidRequest(f"{param} is a file; allowed: input_text, and input_image with image_url", param)


def _parts_of(item: Mapping[str, Any]) -> list[dict[str, Any]]:
    content = item.get("content")
    return [part for part in content if isinstance(part, dict)] if isinstance(content, list) else []


def _check_fields(body: ResponsesBody) -> None:
    given, tool = body.generation_fields(), body.image_tool
    fields = given.fields
    if fields.get("top_logprobs"):
        raise InvalidRequest(f"top_logprobs is not supported here; {_NO_LOGPROBS}", "top_logprobs")
    if tool is None and fields.get("n", 1) != 1:
        raise InvalidRequest.value(given.written["n"], fields["n"], "1 for text; POST /v1/chat/completions takes more")
    if tool is None:
        return
    if isinstance(body.tool_choice, dict) and body.tool_choice.get("type") not in (IMAGE_TOOL, "allowed_tools"):
        raise InvalidRequest.value("tool_choice", body.tool_choice, f'a text, or {{"type": "{IMAGE_TOOL}"}}')
    has_images = bool(body.conversation()[1])
    if tool.action == "edit" and not has_images:
        raise InvalidRequest.value("tools[0].action", "edit", "'auto' or 'generate' without an image in input")
    if tool.action == "generate" and has_images:
        allowed = "'auto' or 'edit' with an image in input; leave the image out to draw without it"
        raise InvalidRequest.value("tools[0].action", "generate", allowed)
