"""The bodies of the images endpoints: JSON, or a form with files."""

from __future__ import annotations

import json
import sys
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args

from pydantic import BeforeValidator, Field, ValidationError
from starlette.datastructures import FormData, Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from bagel_triton.openai.errors import not_allowed, to_invalid_request
from bagel_triton.openai.image_io import ImageUpload, ImageUrl
from bagel_triton.openai.noop_fields import IGNORED, NOOP
from bagel_triton.openai.schema import FIELD_NAMES, BodyFields, FileFields, GivenFields, StrictModel, to_object
from bagel_triton.protocol.errors import InvalidRequest, format_value
from bagel_triton.protocol.request import FIELD_TYPES, MAX_INPUT_IMAGES

Images = tuple[ImageUrl | ImageUpload, ...]
B = TypeVar("B", bound="ImagesBody")
_OBJECTS = ("thinking", "chat_template_kwargs", "image_config")
_SWITCHES = ("stream", "enable_thinking", "do_sample", "continue_final_message", "add_generation_prompt")
_JSON_FIELDS = (*_SWITCHES, *_OBJECTS, "output_compression")
_FREE_TEXTS = ("prompt", "negative_prompt", "stop")
MAX_FORM_FIELDS = 300  # more than there are names
MAX_FORM_TEXT = 2 * 1024 * 1024  # bytes of a field that is no file


class ImagesBody(BodyFields, FileFields):
    """The fields that both endpoints have. ``null`` means not given."""

    place: ClassVar[str] = "images"
    prompt: str = Field(description="What to draw, or how to edit the images.", json_schema_extra={"pattern": r"\S"})
    model: str | None = None
    response_format: Literal["b64_json", "url"] | None = Field(
        None, description="The image itself, or a URL of this server that works for a few minutes. Default: b64_json"
    )
    quality: Literal["auto", "low", "medium", "high", "xhigh", "max", "standard", "hd"] | None = Field(
        None, description="Accepted without effect: num_inference_steps sets the quality."
    )
    background: Literal["auto", "opaque"] | None = Field(None, description="Images are opaque.")
    style: Literal["vivid", "natural"] | None = Field(
        None, description="Accepted without effect: describe the style in the prompt."
    )
    moderation: Literal["auto", "low"] | None = Field(
        None, description="Accepted without effect: nothing is moderated."
    )
    stream: bool | None = Field(None, description="Server-sent events instead of one reply.")

    @property
    def reported_quality(self) -> str | None:
        """``quality`` as a reply has it; None for a value that names none."""
        return self.quality if self.quality in ("low", "medium", "high", "xhigh", "max") else None

    def generation_fields(self) -> GivenFields:
        """The given fields of ``GenerationRequest``.

        Raises:
            InvalidRequest: a field is given by two names, or ``size`` is no size.
        """
        given = GivenFields(self.stream)
        for alias, name in FIELD_NAMES.items():
            given.add(name, getattr(self, alias), alias)
        for name, alias, value in self.thinking_switches():
            given.add(name, value, alias)
        self.add_sampling(given)
        self.add_sizes(given, self.param)
        return given


class EditsBody(ImagesBody):
    """The body of an edit: its images are kept beside it, in whichever form they came."""

    input_fidelity: Literal["high", "low"] | None = Field(
        None, description="Accepted without effect: the model always sees the images in full."
    )


class ImageLink(StrictModel):
    """An image by its URL, as JSON edits have it."""

    place: ClassVar[str] = "image_url"
    image_url: str


def _to_link(value: Any) -> Any:
    """A plain text is the URL, and so is a chat part's ``{"url": ...}``; null members are not given."""
    if isinstance(value, dict):
        value = {name: member for name, member in value.items() if member is not None}
    if isinstance(value, dict) and value.get("type") in ("image_url", "input_image"):
        value = {name: member for name, member in value.items() if name != "type"}
    if isinstance(value, dict) and isinstance(value.get("image_url"), dict):
        value = value["image_url"]
    if isinstance(value, dict) and "file_id" in value:
        raise not_allowed('{"image_url": URL}, as this server keeps no files')
    if isinstance(value, dict) and "url" in value:
        value = value["url"]
    return {"image_url": value} if isinstance(value, str) else value


Link = Annotated[ImageLink, BeforeValidator(_to_link)]


def _to_list(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


class JsonEditsBody(EditsBody):
    """An edit as JSON: its images are URLs."""

    image: Annotated[list[Link], Field(max_length=MAX_INPUT_IMAGES, fail_fast=True), BeforeValidator(_to_list)] = Field(
        [], description="A data: or https: URL, or a list of them."
    )
    images: Annotated[list[Link], Field(max_length=MAX_INPUT_IMAGES, fail_fast=True), BeforeValidator(_to_list)] = (
        Field([], description="The same under the other name it has.")
    )


def parse_generation(data: bytes) -> ImagesBody:
    """The JSON body of a generation.

    Raises:
        InvalidRequest: names the field that is not allowed.
    """
    return _checked(ImagesBody, to_object(data))


def parse_json_edit(data: bytes) -> tuple[EditsBody, Images]:
    """The JSON body of an edit and its images.

    Raises:
        InvalidRequest: names the field that is not allowed.
    """
    body = _checked(JsonEditsBody, to_object(data))
    if body.image and body.images:
        raise InvalidRequest("image and images are both given; allowed: one of them", "images")
    name, links = ("image", body.image) if body.image else ("images", body.images)
    return body, _enough([ImageUrl(link.image_url, f"{name}[{index}]") for index, link in enumerate(links)])


async def parse_form(headers: Headers, stream: AsyncGenerator[bytes, None]) -> tuple[EditsBody, Images]:
    """The form of an edit and its images.

    Raises:
        InvalidRequest: no such form, or names the field that is not allowed.
    """
    parser = _FormParser(
        headers, stream, max_files=MAX_INPUT_IMAGES + 1, max_fields=MAX_FORM_FIELDS, max_part_size=MAX_FORM_TEXT
    )
    try:
        form = await parser.parse()
    except _NotText as error:
        raise InvalidRequest(f"{error}; allowed: a text, or a file with a filename", error.name) from error
    except (MultiPartException, ValueError) as error:
        raise InvalidRequest(f"the body is not a form: {getattr(error, 'message', error)}") from error
    if not parser.ended:
        await form.close()
        raise InvalidRequest("the body is not a form: it ends before its last boundary")
    try:
        return await _from_form(form)
    finally:
        await form.close()


async def _from_form(form: FormData) -> tuple[EditsBody, Images]:
    images: list[ImageUrl | ImageUpload] = []
    texts: dict[str, list[str]] = {}
    objects: dict[str, dict[str, Any]] = {}
    for written, value in form.multi_items():
        name, _, member = written.removesuffix("]").partition("[")  # image[], image[0], thinking[type]
        is_image = name in ("image", "images")
        if isinstance(value, UploadFile):
            if not is_image:
                raise _no_file(name)
            images.append(ImageUpload(await value.read(), f"image[{len(images)}]"))
        elif is_image and value.strip():  # a form has an empty text for a file that was not chosen
            images.append(ImageUrl(value, f"image[{len(images)}]"))
        elif not is_image and member and _is_object(name):
            objects.setdefault(name, {})[member] = _scalar(value)
        elif not is_image and name not in IGNORED["images"]:
            texts.setdefault(written if member and not member.isdigit() else name, []).append(value)
    if both := objects.keys() & texts.keys():
        name = min(both)
        raise InvalidRequest(f"{name} is given whole and by its members; allowed: one of them", name)
    return _checked(EditsBody, {**_from_texts(texts), **objects}), _enough(images)


class _NotText(Exception):
    """The field ``name`` of a form has no filename, and is no text."""

    def __init__(self, name: str, cause: Exception) -> None:
        super().__init__(f"{name} is not text in UTF-8: {cause}")
        self.name = name


class _FormParser(MultiPartParser):
    """Keeps files in memory: they are bounded by the body's limit, and a disk is slower than what reads them."""

    spool_max_size = sys.maxsize
    ended = False

    def on_end(self) -> None:
        self.ended = True

    def on_part_end(self) -> None:
        part = self._current_part
        if part.file is None:
            try:
                part.data.decode(self._charset or "utf-8")
            except (UnicodeDecodeError, LookupError) as error:  # the parser would read it as another charset
                raise _NotText(part.field_name, error) from error
        super().on_part_end()


def _no_file(name: str) -> InvalidRequest:
    if name in ("mask", "markup"):
        return refuse_mask(name)
    return InvalidRequest(f"{name} is a file; allowed as files: image", name)


def refuse_mask(name: str) -> InvalidRequest:
    """The error for a mask: what the model cannot do, and what to do instead."""
    return InvalidRequest(
        f"{name} is not supported: this model edits by instruction, over the whole image; "
        "say in the prompt what to change and where, or put the unchanged part back afterwards",
        name,
    )


def _from_texts(texts: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """A form's fields with the types that JSON would have given them; one that is empty or null is not given.

    Prompts and stop texts are taken as they are.
    """
    body: dict[str, Any] = {}
    for name, values in texts.items():
        kinds = _kinds(name)
        if name not in _FREE_TEXTS and len(values) == 1 and values[0].strip() in ("", "null"):
            continue
        if tuple in kinds and (len(values) > 1 or not values[0].lstrip().startswith("[")):
            body[name] = [_scalar(value) if str not in kinds else value for value in values]
        elif len(values) > 1:
            raise InvalidRequest(f"{name} is given {len(values)} times; allowed: once", name)
        elif str in kinds and tuple not in kinds and not (name == "image_size" and values[0].lstrip().startswith("{")):
            body[name] = values[0]
        elif values[0].strip():
            body[name] = _scalar(values[0])
    return body


def _is_object(name: str) -> bool:
    return name in (*_OBJECTS, "image_size") or dict in _kinds(name)


def _kinds(name: str) -> set[type]:
    """The types that the field ``name`` takes; an unknown field is a text."""
    if name == "stop":
        return {tuple, str}
    if name in _JSON_FIELDS or name in NOOP["images"]:
        return {int}
    if name not in FIELD_NAMES:
        return {str}
    annotation = FIELD_TYPES[FIELD_NAMES[name]]
    kinds = {getattr(kind, "__origin__", kind) for kind in get_args(annotation)}
    return {str} if str in kinds else kinds


def _scalar(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text.lower() == "true" if text.lower() in ("true", "false") else text


def _checked(model: type[B], fields: dict[str, Any]) -> B:
    for name in ("mask", "markup", "input_image_mask"):
        if fields.get(name) is not None:
            raise refuse_mask(name)
    try:
        body = model.model_validate(fields)
    except ValidationError as error:
        raise to_invalid_request(error) from error
    if body.stream and body.response_format == "url":
        raise InvalidRequest.value("response_format", "url", "b64_json with stream=true")
    return body


def _enough(images: Sequence[ImageUrl | ImageUpload]) -> Images:
    if not images:
        raise InvalidRequest("image is required; POST /v1/images/generations draws without one", "image")
    if len(images) > MAX_INPUT_IMAGES:
        raise InvalidRequest(f"image={format_value(len(images))} images; allowed: at most {MAX_INPUT_IMAGES}", "image")
    return tuple(images)
