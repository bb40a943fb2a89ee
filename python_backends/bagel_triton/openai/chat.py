"""Which task a chat request asks for, and what it asks the model."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from bagel_triton.openai.image_source import ImageLoader, ImageUrl
from bagel_triton.openai.schema import ChatBody, ChatMessage, ImagePart
from bagel_triton.protocol.errors import InvalidRequest
from bagel_triton.protocol.request import MAX_INPUT_IMAGES, GenerationRequest, ImageRef, Modality, TextPart, Turn
from bagel_triton.triton.async_client import Client, StageResponse

_MODALITIES: dict[tuple[str, ...], Modality] = {("text",): "text", ("image",): "image", ("image", "text"): "image"}


@dataclass(frozen=True)
class Task:
    """A chat request in the model's terms, but for its images, which are still URLs.

    ``fields`` are the given fields of ``GenerationRequest``; ``written`` is what the body
    calls those that have another name there.
    """

    modality: Modality
    turns: tuple[Turn, ...]
    images: tuple[ImageUrl, ...]
    fields: dict[str, Any]
    written: dict[str, str]

    async def run(
        self, client: Client, source: ImageLoader, request_id: str, headers: Mapping[str, str]
    ) -> AsyncGenerator[StageResponse, None]:
        """Load the images, then relay what ``client`` answers; closing it cancels the request.

        Raises:
            BagelError: whatever went wrong, in the body's names.
        """
        try:
            request = GenerationRequest(
                messages=self.turns,
                image=await source.load(self.images) or None,
                modality=self.modality,
                **self.fields,
            )
            async with aclosing(client.generate(request, request_id, headers)) as responses:
                async for response in responses:
                    yield response
        except InvalidRequest as error:
            raise self._in_the_bodys_names(error) from error

    def _in_the_bodys_names(self, error: InvalidRequest) -> InvalidRequest:
        names = self.written | {f"image[{index}]": image.param for index, image in enumerate(self.images)}
        if error.param not in names:
            return error
        name = names[error.param]
        message = error.message
        if message.startswith(error.param):
            message = name + message.removeprefix(error.param)
        return type(error)(message, name)


def to_task(body: ChatBody) -> Task:
    """What ``body`` asks for.

    Raises:
        InvalidRequest: modalities, roles or parts that make no request.
    """
    fields, written = body.generation_fields()
    modality = _modality(body.modalities, fields)
    images: list[ImageUrl] = []
    turns = tuple(_turn(message, f"messages[{index}]", images) for index, message in enumerate(body.messages))
    if turns[-1].role != "user":
        param = f"messages[{len(turns) - 1}].role"
        raise InvalidRequest.value(param, body.messages[-1].role, "'user' for the last message")
    if len(images) > MAX_INPUT_IMAGES:
        raise InvalidRequest.value("messages", f"{len(images)} images", f"at most {MAX_INPUT_IMAGES} images")
    return Task(modality, turns, tuple(images), fields, written)


def _modality(given: list[str] | None, fields: dict[str, Any]) -> Modality:
    """What is wanted; an image with text is one with thinking, which is set in ``fields``."""
    if given is None:
        return "text"
    modality = _MODALITIES.get(tuple(sorted(given)))
    if modality is None:
        allowed = ", ".join(json.dumps(list(known)) for known in _MODALITIES)
        raise InvalidRequest.value("modalities", given, allowed)
    if len(given) == 2 and not fields.setdefault("think", True):
        raise InvalidRequest.value("think", False, f"true with modalities {json.dumps(given)}")
    return modality


def _turn(message: ChatMessage, param: str, images: list[ImageUrl]) -> Turn:
    """``message`` as a turn; its images are added to ``images``."""
    role = "system" if message.role == "developer" else message.role
    if message.reasoning_content is not None and role != "assistant":
        name = f"{param}.reasoning_content"
        where = f"in a message of role {message.role!r}"
        raise InvalidRequest.meaningless(name, message.reasoning_content, where, "only in one of role 'assistant'")
    parts: list[TextPart | ImageRef] = []
    for index, part in enumerate(message.content):
        if not isinstance(part, ImagePart):
            parts.append(TextPart(part.text))
            continue
        name = f"{param}.content[{index}]"
        if role == "system":
            raise InvalidRequest.value(f"{name}.type", part.type, f"'text' in a message of role {message.role!r}")
        parts.append(ImageRef(len(images)))
        images.append(ImageUrl(part.image_url.url, f"{name}.image_url"))
    return Turn(role, tuple(parts))
