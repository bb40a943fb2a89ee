"""Strict pydantic models of request bodies, and the generation fields that all of them have.

The generation fields, their types, aliases and descriptions come from
:mod:`bagel_triton.protocol.request`: a field declared there is accepted here, at top level and
inside ``extra_body``. Ranges are checked by the planning stage, which owns them.
"""

from __future__ import annotations

import functools
import json
import re
import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Union, get_args, get_origin

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Strict,
    Tag,
    create_model,
    model_validator,
)

from bagel_triton.openai.errors import noop_field, not_allowed, path, unknown_field
from bagel_triton.openai.image_io import Format
from bagel_triton.openai.noop_fields import IGNORED, NOOP
from bagel_triton.protocol.errors import InvalidRequest, format_value, truncate
from bagel_triton.protocol.request import ASPECT_RATIO, FIELD_ALIASES, FIELD_TYPES, MAX_STOPS, REQUEST_FIELDS, TEXT
from bagel_triton.protocol.validation import aspect_ratio

_CONVERSATION = ("prompt", "image", "messages", "modality")  # made of the body's messages and modalities


NAMED_SIZES = {"1K": 1024}  # of OpenRouter's and Gemini's clients; 2K and 4K are more than the model draws
MAX_DIGITS = 4000  # of a number; Python itself stops a little later
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max", "auto", "default"] | None


class StrictModel(BaseModel):
    """No coercion and no NaN. ``null`` means not given for every field, an empty text for those that choose.

    ``place`` names the tables of :mod:`noop_fields` that apply; any other unknown field is
    refused with the names of the known ones.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)
    place: ClassVar[str] = ""

    @model_validator(mode="before")
    @classmethod
    def _known_fields(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        ignored, noop = IGNORED.get(cls.place, frozenset()), NOOP.get(cls.place, {})
        choosing = choosing_fields(cls)
        kept = {}
        for name, member in value.items():
            if member is None or name in ignored or (member == "" and name in choosing):
                continue
            if name in cls.model_fields:
                kept[name] = member
            elif name not in noop:
                raise unknown_field(name, list(cls.model_fields))
            elif not noop[name].permits(member):
                raise noop_field(name, member, noop[name].values, noop[name].instead)
        return kept


@functools.cache
def choosing_fields(model: type[StrictModel]) -> frozenset[str]:
    """The fields of ``model`` that choose among names and may be left out: clients write "" for no choice."""
    return frozenset(
        name
        for name, field in model.model_fields.items()
        if name in ("model", "lora", "stop", "size", "image_size", "aspect_ratio")
        or (not field.is_required() and name != "type" and _chooses(field.annotation))
        or (name in FIELD_NAMES and REQUEST_FIELDS[FIELD_NAMES[name]].choices)
    )


def _chooses(annotation: Any) -> bool:
    if get_origin(annotation) is Literal:
        return True
    return get_origin(annotation) in (Annotated, Union, types.UnionType) and any(map(_chooses, get_args(annotation)))


def _to_integer(value: Any) -> Any:
    """64.0 is 64: some languages write every number so."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _to_texts(stop: Any) -> Any:
    """A plain text is a list of one text."""
    if isinstance(stop, str):
        return [stop]
    if not isinstance(stop, list):
        raise not_allowed("a text or a list of texts")
    if len(stop) > MAX_STOPS:  # before each of them is looked at
        raise not_allowed(f"at most {MAX_STOPS} texts")
    return stop


def _to_token_ids(bias: Any) -> Any:
    """JSON's names are texts, and these are token ids."""
    if not isinstance(bias, dict):
        raise not_allowed("an object")
    if not all(re.fullmatch(r"[0-9]{1,9}", token) for token in bias):
        raise not_allowed(REQUEST_FIELDS["logit_bias"].allowed)
    token_ids = {int(token): value for token, value in bias.items()}
    if len(token_ids) < len(bias):  # "5" and "05" are one token
        raise not_allowed("each token once")
    return token_ids


def _validator(name: str, annotation: Any) -> Callable[[Any], Any] | None:
    if name == "stop":
        return _to_texts
    if name == "logit_bias":
        return _to_token_ids
    if name == "lora":
        return lambda lora: None if lora == {} else lora
    if name == "aspect_ratio":
        return _to_ratio
    return _to_integer if int in get_args(annotation) else None


def _to_ratio(ratio: Any) -> Any:
    """Names of the default's ratio are not given: an edit's is that of its image."""
    if not isinstance(ratio, str) or ratio in ("auto", "match_input_image"):
        return None if isinstance(ratio, str) else ratio
    if re.fullmatch(ASPECT_RATIO, ratio) is None:
        raise not_allowed(f"{REQUEST_FIELDS['aspect_ratio'].allowed}, 'auto' or 'match_input_image'")
    return ratio


def _json_type(annotation: Any) -> Any:
    """JSON has no tuples: if ``annotation`` wants one, a list is taken."""
    members = (Annotated[kind, Strict(False)] if get_origin(kind) is tuple else kind for kind in get_args(annotation))
    return Union[tuple(members)]  # noqa: UP007 - built from a sequence


def _field(name: str) -> Any:
    """The pydantic declaration of the request field ``name``."""
    declared, annotation = REQUEST_FIELDS[name], FIELD_TYPES[name]
    json_type, validator = _json_type(annotation), _validator(name, annotation)
    if validator is not None:
        json_type = Annotated[json_type, BeforeValidator(validator)]
    allowed, default = declared.allowed, declared.default
    notes = [declared.doc, *([f"Allowed: {allowed}"] if allowed else []), *([f"Default: {default}"] if default else [])]
    return (json_type, Field(None, description=". ".join(notes)))


_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_WHOLE = "whole Unicode characters; a lone surrogate is half of one"
# The names of the generation fields in a body, aliases too, and those that they have in the request.
FIELD_NAMES = {name: name for name in REQUEST_FIELDS if name not in _CONVERSATION} | FIELD_ALIASES
if TYPE_CHECKING:

    class GenerationFields(StrictModel):
        """The fields of ``GenerationRequest`` except those that say the conversation, and their aliases."""
else:
    GenerationFields = create_model(
        "GenerationFields", __base__=StrictModel, **{written: _field(name) for written, name in FIELD_NAMES.items()}
    )


_Integer = Annotated[int, BeforeValidator(_to_integer)]
_Ratio = Annotated[str | None, BeforeValidator(_to_ratio)]


class ImageSize(StrictModel):
    """``image_size`` as SiliconFlow's and fal's clients may give it."""

    width: _Integer
    height: _Integer


def _size_text(value: Any) -> Any:
    if not isinstance(value, str):
        raise not_allowed("a text, or an object with width and height")
    return value


_Size = Annotated[
    Annotated[str, BeforeValidator(_size_text), Tag("text")] | Annotated[ImageSize, Tag("sides")],
    Discriminator(lambda value: "sides" if isinstance(value, dict | ImageSize) else "text"),
]


class ImageConfig(StrictModel):
    """``image_config`` as OpenRouter's API has it."""

    aspect_ratio: _Ratio = None
    image_size: _Size | None = None


class SizeFields(GenerationFields):
    """The generation fields, and other ways to say an image's width and height."""

    size: str | None = Field(
        None, description="WIDTHxHEIGHT in pixels, multiples of 16; or auto; or 1K, which is 1024."
    )
    image_size: _Size | None = Field(None, description="As size, or an object with width and height.")
    image_config: ImageConfig | None = Field(None, description="aspect_ratio and image_size, in one object.")

    def add_sizes(self, given: GivenFields, named: Callable[[str], str]) -> None:
        """Take the sides and their ratio from these fields.

        Args:
            named: the name of a field in an error.

        Raises:
            InvalidRequest: one is no size, or they contradict each other or what is ``given``.
        """
        config = self.image_config or ImageConfig()
        given.add("aspect_ratio", config.aspect_ratio, named("image_config.aspect_ratio"))
        sizes = {"size": self.size, "image_size": self.image_size, "image_config.image_size": config.image_size}
        for name, size in sizes.items():
            if isinstance(size, ImageSize):
                given.add("width", size.width, named(f"{name}.width"))
                given.add("height", size.height, named(f"{name}.height"))
            else:
                given.add_size(size, named(name))


class FileFields(StrictModel):
    """The file that an image becomes."""

    output_format: Format | None = Field(None, description="The file format of the images. Default: png")
    output_compression: Annotated[int, Field(ge=0, le=100)] | None = Field(
        None, description="Quality of a jpeg or webp, 0 to 100. Default: 100. A png is lossless."
    )

    @property
    def file_format(self) -> Format:
        """The format, or its default."""
        return self.output_format or "png"

    @property
    def compression(self) -> int:
        """The quality, or its default."""
        return 100 if self.output_compression is None else self.output_compression


class TemplateOptions(StrictModel):
    """``chat_template_kwargs`` of other servers: the switches of thinking, and those of a last message."""

    place: ClassVar[str] = "template_options"
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    enable_thinking: bool | None = None
    thinking: bool | None = None
    reasoning_effort: Effort = None
    thinking_budget: int | None = None


class Thinking(StrictModel):
    """``thinking`` as Anthropic's API has it."""

    place: ClassVar[str] = "thinking"
    type: Literal["enabled", "disabled", "adaptive", "auto"] | None = None
    budget_tokens: int | None = None


Switch = tuple[str, str, bool | int | None]  # a field, its name in the body, and its value


_LAST_MESSAGE = "Whether a last message of the assistant {}. No effect after any other, and beside an image."


class BodyFields(SizeFields):
    """The generation fields, and the names that other APIs have for the switches of thinking and sampling."""

    reasoning_effort: Effort = None
    enable_thinking: bool | None = None
    thinking: Thinking | None = None
    chat_template_kwargs: TemplateOptions | None = None
    do_sample: bool | None = Field(None, description="false is temperature 0, true 1 unless a temperature is given.")
    continue_final_message: bool | None = Field(None, description=_LAST_MESSAGE.format("is continued. Default: true"))
    add_generation_prompt: bool | None = Field(
        None, description=_LAST_MESSAGE.format("is followed by a new one. Default: false")
    )

    def param(self, name: str) -> str:
        """``name`` as an error has it."""
        return name

    def continues_last(self) -> bool:
        """Whether a last message of the assistant is continued.

        Raises:
            InvalidRequest: two of the fields that say so contradict each other.
        """
        options = self.chat_template_kwargs or TemplateOptions()
        says = [
            ("continue_final_message", self.continue_final_message, True),
            ("add_generation_prompt", self.add_generation_prompt, False),
            ("chat_template_kwargs.continue_final_message", options.continue_final_message, True),
            ("chat_template_kwargs.add_generation_prompt", options.add_generation_prompt, False),
        ]
        given = [(name, value, value is sense) for name, value, sense in says if value is not None]
        for name, value, continues in given[1:]:
            first, other, before = given[0]
            if continues is not before:
                first, name = self.param(first), self.param(name)
                shown = f"{first}={format_value(other)} and {name}={format_value(value)}"
                raise InvalidRequest(f"{shown} contradict each other; allowed: one of them", name)
        return given[0][2] if given else True

    def add_sampling(self, given: GivenFields) -> None:
        """Take the temperature from ``do_sample``, unless the body gives one itself.

        Raises:
            InvalidRequest: that one means the contrary.
        """
        name = "top_p" if given.fields.get("top_p") == 0 else "temperature"  # a nucleus of nothing is greedy, too
        temperature, alias = given.fields.get(name), self.param("do_sample")
        if self.do_sample is None or (temperature is not None and bool(temperature) == self.do_sample):
            return
        if temperature is not None:
            beside = f"{given.written[name]}={format_value(temperature)}"
            allowed = f"{format_value(not self.do_sample)} beside {beside}"
            raise InvalidRequest.value(alias, self.do_sample, allowed)
        given.add("temperature", TEXT.temperature_with_nucleus if self.do_sample else 0.0, alias)

    def thinking_switches(self) -> list[Switch]:
        """Each of these names that is given, or None for its value."""
        switches: list[Switch] = [("think", "enable_thinking", self.enable_thinking)]
        if self.reasoning_effort is not None:
            switches.append(("think", "reasoning_effort", thinks(self.reasoning_effort)))
        if self.thinking is not None:
            on = None if self.thinking.type is None else self.thinking.type != "disabled"
            switches.append(("think", "thinking", on))
            switches.append(("max_think_tokens", "thinking.budget_tokens", self.thinking.budget_tokens))
        if (options := self.chat_template_kwargs) is not None:
            effort = None if options.reasoning_effort is None else thinks(options.reasoning_effort)
            switches += [
                ("think", "chat_template_kwargs.enable_thinking", options.enable_thinking),
                ("think", "chat_template_kwargs.thinking", options.thinking),
                ("think", "chat_template_kwargs.reasoning_effort", effort),
                ("max_think_tokens", "chat_template_kwargs.thinking_budget", options.thinking_budget),
            ]
        return switches


def thinks(effort: str) -> bool:
    """Whether a reasoning effort of that name switches thinking on."""
    return effort not in ("none", "minimal")


class GivenFields:
    """The fields of ``GenerationRequest`` that a body gives.

    Attributes:
        fields: the values by name.
        written: the name that each has in the body.
        parts_of: the body's own value, for fields that are a part of one, as the height is of a size.
    """

    def __init__(self, stream: bool | None) -> None:
        self.fields: dict[str, Any] = {}
        self.written: dict[str, str] = {}
        self.parts_of: dict[str, str] = {}
        self._stream = bool(stream)

    def add(self, name: str, value: Any, alias: str) -> None:
        """Take ``value`` for ``name``, written as ``alias``; None and empty values give nothing.

        Nor do previews without a stream, which alone can carry them.

        Raises:
            InvalidRequest: the field is given already, with another value.
        """
        if value is None or value == () or value == {} or (name == "partial_images" and not self._stream):
            return
        if name in self.fields and self.fields[name] != value:
            first, second = format_value(self.fields[name]), format_value(value)
            given = f"{self.written[name]} and {alias} are both given, with the values {first} and {second}"
            raise InvalidRequest(f"{given}; allowed: one of them", alias)
        self.fields[name], self.written[name] = value, self.written.get(name, alias)

    def add_size(self, size: str | None, alias: str) -> None:
        """Take width and height from ``size``, which has them in that order; ``auto`` gives neither.

        ``1K`` is a square, or with a ratio that is given already the longer side.

        Raises:
            InvalidRequest: it is no size, or a side is given already, with another value.
        """
        if size is None or size.strip() in ("auto", ""):
            return
        found = re.fullmatch(r"([0-9]{1,6})\s*[xX*\u00d7]\s*([0-9]{1,6})", size.strip())
        if size.strip().upper() in NAMED_SIZES:
            sides = self._named_sides(NAMED_SIZES[size.strip().upper()])
        elif found is not None:
            sides = {"width": int(found[1]), "height": int(found[2])}
        else:
            allowed = f"'auto', {', '.join(map(repr, NAMED_SIZES))} or 'WIDTHxHEIGHT', such as '512x512'"
            raise InvalidRequest.value(alias, size, f"{allowed}; or height and width")
        for name, side in sides.items():
            self.add(name, side, alias)
            if self.written[name] == alias:
                self.parts_of[name] = size

    def _named_sides(self, side: int) -> dict[str, int]:
        ratio = aspect_ratio(self.fields.get("aspect_ratio"))
        if ratio is None:
            return {"width": side, "height": side}
        return {"width": side} if ratio >= 1 else {"height": side}

    def in_body_names(self, error: InvalidRequest) -> InvalidRequest:
        """``error`` about one of the fields, with the name and the value that the body has for it."""
        param, message = error.param or "", error.message
        if (name := self.written.get(param)) is None:
            return error
        shown = f"{param}={format_value(self.fields.get(param))}"
        if param in self.parts_of and message.startswith(shown):
            whole = format_value(self.parts_of[param])
            problem, _, allowed = message.removeprefix(shown).partition("; ")
            message = f"{name}={whole}{problem}: its {param} is {self.fields[param]}; {allowed}"
        elif message.startswith(param):
            message = name + message.removeprefix(param)
        return type(error)(message, name)


class NotJson(InvalidRequest):
    """The request body is not JSON."""

    @property
    def kind(self) -> str:
        return InvalidRequest.__name__


def to_object(data: bytes) -> dict[str, Any]:
    """The JSON object in ``data``; a byte-order mark before it is no part of it.

    Raises:
        NotJson: it cannot be parsed.
        InvalidRequest: not an object, a field that is there twice, or half a character.
    """
    try:
        body = json.loads(data.decode("utf-8-sig"), object_pairs_hook=_unique, parse_int=_to_int)
    except RecursionError as error:
        raise NotJson("the body is not JSON: it is nested too deeply") from error
    except ValueError as error:
        raise NotJson(f"the body is not JSON: {truncate(str(error))}") from error
    if not isinstance(body, dict):
        raise InvalidRequest.value("body", body, "a JSON object")
    if _SURROGATE.search(data):
        _check_characters(body)
    return body


def _check_characters(body: dict[str, Any]) -> None:
    """Refuse half a character, which would break every reply that shows it.

    Raises:
        InvalidRequest: names the field that has a lone surrogate, in its value or its own name.
    """
    left: list[tuple[tuple[int | str, ...], Any]] = [((), body)]
    while left:  # a body may be nested as deeply as the parser allows
        place, value = left.pop()
        if isinstance(value, dict):
            for name, member in value.items():
                if not _is_whole(name):
                    named = path((*place, name))
                    raise InvalidRequest(f"{truncate(named)} is no name of a field; allowed: {_WHOLE}", named)
                left.append(((*place, name), member))
        elif isinstance(value, list):
            left += [((*place, index), member) for index, member in enumerate(value)]
        elif isinstance(value, str) and not _is_whole(value):
            raise InvalidRequest.value(path(place), value, _WHOLE)


def _is_whole(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _to_int(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number has {len(digits)} digits; allowed: at most {MAX_DIGITS}")
    return int(digits)


def _unique(members: list[tuple[str, Any]]) -> dict[str, Any]:
    whole = dict(members)
    if len(whole) == len(members):
        return whole
    names = [name for name, _ in members]
    twin = next(name for at, name in enumerate(names) if name in names[:at])
    raise InvalidRequest(f"{truncate(twin)} is given {names.count(twin)} times in one object; allowed: once", twin)
