"""``POST /v1/chat/completions``: a chat body as a request to the model, and the form of its reply."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Literal

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from bagel_triton.openai import stream
from bagel_triton.openai.chat_schema import ChatBody, ChatMessage, ImagePart, ThoughtPart, parse
from bagel_triton.openai.endpoint import Api, unless_gone
from bagel_triton.openai.image_io import ImageLoader, ImageUpload, ImageUrl
from bagel_triton.openai.reply import ImageReply, ReplyOptions, collect, new_header
from bagel_triton.openai.schema import BodyFields, GivenFields
from bagel_triton.protocol.errors import InvalidRequest
from bagel_triton.protocol.request import MAX_INPUT_IMAGES, GenerationRequest, ImageRef, Modality, TextPart, Turn
from bagel_triton.triton.client import Client, StageResponse

_MODALITIES: dict[tuple[str, ...], Modality] = {("text",): "text", ("image",): "image", ("image", "text"): "image"}


def routes(api: Api) -> list[Route]:
    """The endpoint's route."""

    @api.endpoint
    async def chat_completions(request: Request) -> Response:
        body = await api.parse(request, parse)
        task = to_task(body)
        header = new_header(await api.served_model(body.model, task.given))
        responses = api.run(task, request, header.id)
        options = reply_options(body, task.modality, request.headers, api.settings.http.image_reply)
        if body.stream:
            chunks = stream.chunks(responses, header, options)
            return stream.event_stream(await unless_gone(request, anext(chunks)), chunks)
        async with aclosing(responses):
            completion = await unless_gone(request, collect(responses, header, options))
        return Response(msgspec.json.encode(completion), media_type="application/json")

    return [Route("/v1/chat/completions", chat_completions, methods=["POST"])]


@dataclass(frozen=True)
class Task:
    """A chat request in the model's terms, but for its images, which are still URLs.

    ``texts`` are the body's names of the turns' texts, where they are not those of a chat.
    """

    modality: Modality
    turns: tuple[Turn, ...]
    images: tuple[ImageUrl | ImageUpload, ...]
    given: GivenFields
    texts: Mapping[str, str] = field(default_factory=dict)

    async def run(
        self, client: Client, source: ImageLoader, request_id: str, headers: Mapping[str, str]
    ) -> AsyncGenerator[StageResponse, None]:
        """Load the images, then relay what ``client`` answers; closing it cancels the request.

        Raises:
            BagelError: any failure, in the body's names.
        """
        try:
            request = GenerationRequest(
                messages=self.turns,
                image=await source.load(self.images) or None,
                modality=self.modality,
                **self.given.fields,
            )
            async with aclosing(client.generate(request, request_id, headers)) as responses:
                async for response in responses:
                    yield response
        except InvalidRequest as error:
            raise self._in_body_names(error) from error

    def _in_body_names(self, error: InvalidRequest) -> InvalidRequest:
        names = {**self.texts, **{f"image[{index}]": image.param for index, image in enumerate(self.images)}}
        if error.param not in names:
            return self.given.in_body_names(error)
        name = names[error.param]
        message = error.message
        if message.startswith(error.param):
            message = name + message.removeprefix(error.param)
        return type(error)(message, name)


def to_task(body: ChatBody) -> Task:
    """The task in ``body``.

    Raises:
        InvalidRequest: modalities, roles or parts that make no request.
    """
    given = body.generation_fields()
    modality = _modality(body.modalities, body.param("modalities"))
    images: list[ImageUrl] = []
    turns = tuple(_turn(message, f"messages[{index}]", images) for index, message in enumerate(body.messages))
    if len(images) > MAX_INPUT_IMAGES:
        raise InvalidRequest.value("messages", f"{len(images)} images", f"at most {MAX_INPUT_IMAGES} images")
    return Task(modality, with_end(turns, modality, body), tuple(images), given)


def with_end(turns: tuple[Turn, ...], modality: Modality, body: BodyFields) -> tuple[Turn, ...]:
    """``turns``, of which a last one of the assistant has ended if ``body``, which requests a text, says so.

    Raises:
        InvalidRequest: it says so and the contrary.
    """
    if modality != "text" or turns[-1].role != "assistant" or body.continues_last():
        return turns
    return (*turns[:-1], msgspec.structs.replace(turns[-1], ended=True))


# How the User-Agent begins of clients that reject a list as a message's content.
_TEXT_CONTENT_ONLY = ("litellm/", "aiperf", "ai/")
_AI_SDK = "ai-sdk/"  # in the User-Agent of Vercel's AI SDK, whichever package sends the request
# The languages of OpenAI's SDKs that take a reply as it is; all others decode ``content`` as a text.
_UNTYPED_SDKS = ("python", "js")


def reply_options(
    body: ChatBody, modality: Modality, headers: Mapping[str, str], default: ImageReply | Literal["auto"]
) -> ReplyOptions:
    """The reply that ``body`` requests.

    Args:
        headers: the request's, by lower-case name.
        default: where images are unless ``body`` says it; ``auto`` looks at the client.
    """
    images = body.image_reply or (_for_client(body, headers) if default == "auto" else default)
    wanted = body.stream_options
    return ReplyOptions(
        modality=modality,
        images=images,
        include_usage=bool((wanted and wanted.include_usage) or (body.usage and body.usage.include)),
        include_progress=bool(wanted and wanted.include_progress),
        include_reasoning=not body.excludes_reasoning,
    )


def _for_client(body: ChatBody, headers: Mapping[str, str]) -> ImageReply:
    """The place of images in the reply to the client that sent ``body``.

    No one form serves them all. vLLM-Omni's clients and LangChain read a list in ``content``,
    which LiteLLM, aiperf, Vercel's AI SDK and OpenAI's SDKs of typed languages refuse to parse;
    LiteLLM, Open WebUI and OpenRouter's clients read ``images``. So both are there, but for
    clients that a list would break. LiteLLM sends OpenAI's SDK's headers; unlike LangChain, it
    wants the raw response of a body that does not mention ``stream``. A stream has ``images``
    alone: OpenAI's stream helpers, which add up every member of a delta, make no sense of a list
    where they expect a text.
    """
    agent, language = headers.get("user-agent", "").lower(), headers.get("x-stainless-lang", "python").lower()
    if body.stream or agent.startswith(_TEXT_CONTENT_ONLY) or _AI_SDK in agent or language not in _UNTYPED_SDKS:
        return "images"
    is_litellm = "x-stainless-raw-response" in headers and body.stream is None
    return "images" if is_litellm else "both"


def _modality(given: list[str] | None, param: str) -> Modality:
    """The kind of output; for an image and a text it is an image, with its thought if there is one."""
    if not given:
        return "text"
    modality = _MODALITIES.get(tuple(sorted(set(given))))
    if modality is None:
        allowed = ", ".join(json.dumps(list(known)) for known in _MODALITIES)
        raise InvalidRequest.value(param, given, allowed)
    return modality


def _turn(message: ChatMessage, param: str, images: list[ImageUrl]) -> Turn:
    """``message`` as a turn; its images are added to ``images``."""
    role = "system" if message.role == "developer" else message.role
    parts: list[TextPart | ImageRef] = []
    named = [(f"{param}.content[{index}]", part) for index, part in enumerate(message.content)]
    shown = {part.image_url.url for part in message.content if isinstance(part, ImagePart)}
    for index, image in enumerate(message.images):
        if image.image_url.url not in shown:
            named.append((f"{param}.images[{index}]", image))
    for name, part in named:
        if isinstance(part, ThoughtPart):
            continue
        if not isinstance(part, ImagePart):
            parts.append(TextPart(part.text))
            continue
        if role == "system":
            raise InvalidRequest.value(f"{name}.type", part.type, f"'text' in a message of role {message.role!r}")
        parts.append(ImageRef(len(images)))
        images.append(ImageUrl(part.image_url.url, f"{name}.image_url"))
    return Turn(role, tuple(parts))
