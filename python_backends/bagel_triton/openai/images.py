"""``/v1/images/generations`` and ``/v1/images/edits``."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Literal

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from bagel_triton.openai import sse
from bagel_triton.openai.chat import Task
from bagel_triton.openai.endpoint import Api, unless_gone
from bagel_triton.openai.errors import NotFound, error_response
from bagel_triton.openai.image_io import ImageStore, encode, encode_base64
from bagel_triton.openai.images_schema import Images, ImagesBody, parse_form, parse_generation, parse_json_edit
from bagel_triton.openai.reply import Header, Metrics, incomplete, metrics, new_header
from bagel_triton.openai.schema import GivenFields
from bagel_triton.protocol.errors import truncate
from bagel_triton.protocol.events import AnswerEvent, DoneEvent, ImageEvent, PartialImageEvent, ProgressEvent
from bagel_triton.protocol.messages import Usage as StageUsage
from bagel_triton.protocol.request import ImageRef, TextPart, Turn
from bagel_triton.triton.client import StageResponse

FILES = "/v1/images/files/"
STORE_BYTES, STORE_S = 256 * 1024 * 1024, 600.0


class TokensDetails(msgspec.Struct, frozen=True):
    """Tokens of images, and of text."""

    image_tokens: int
    text_tokens: int


class ImagesUsage(msgspec.Struct, frozen=True):
    """True token counts in the images API's names."""

    input_tokens: int
    input_tokens_details: TokensDetails
    output_tokens: int
    output_tokens_details: TokensDetails
    total_tokens: int


class ImageData(msgspec.Struct, frozen=True, omit_defaults=True):
    """One image, and the thought before it in ``revised_prompt``."""

    seed: int
    b64_json: str | None = None
    url: str | None = None
    revised_prompt: str | None = None


class ImagesReply(msgspec.Struct, frozen=True):
    """The reply to a request that is not streamed; ``size`` is width and height in pixels."""

    created: int
    data: tuple[ImageData, ...]
    size: str
    output_format: str
    usage: ImagesUsage
    model: str
    seed: int | None
    metrics: Metrics
    quality: str | msgspec.UnsetType = msgspec.UNSET
    background: Literal["opaque"] = "opaque"


class StreamedImage(msgspec.Struct, frozen=True):
    """An event of a streamed reply: a preview, or with ``usage`` a finished image.

    ``index`` is the image's place among the ``n`` of the request.
    """

    type: str
    b64_json: str
    created_at: int
    size: str
    quality: str
    output_format: str
    index: int
    background: Literal["opaque"] = "opaque"
    partial_image_index: int | msgspec.UnsetType = msgspec.UNSET
    usage: ImagesUsage | msgspec.UnsetType = msgspec.UNSET
    seed: int | msgspec.UnsetType = msgspec.UNSET
    revised_prompt: str | msgspec.UnsetType = msgspec.UNSET


Endpoint = Literal["image_generation", "image_edit"]


@dataclass(frozen=True)
class _Job:
    """One request: its body and the fields that it gives, and its images if it edits some."""

    body: ImagesBody
    images: Images
    endpoint: Endpoint
    header: Header
    given: GivenFields

    def task(self) -> Task:
        references = [ImageRef(index) for index in range(len(self.images))]
        turn = Turn("user", (*references, TextPart(self.body.prompt)))
        texts = {"messages[0].content": "prompt", "messages": "prompt"}
        return Task("image", (turn,), self.images, self.given, texts)


def routes(api: Api) -> list[Route]:
    """The endpoints' routes, and that of images requested as URLs."""
    store = ImageStore(STORE_BYTES, STORE_S)

    @api.endpoint
    async def generations(request: Request) -> Response:
        body = await api.parse(request, parse_generation)
        return await answer(request, body, (), "image_generation")

    @api.endpoint
    async def edits(request: Request) -> Response:
        if request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
            async with api.body(request) as parts:
                body, images = await parse_form(request.headers, parts)
        else:
            kinds = "application/json or multipart/form-data"
            body, images = await api.parse(request, parse_json_edit, kinds)
        return await answer(request, body, images, "image_edit")

    async def answer(request: Request, body: ImagesBody, images: Images, endpoint: Endpoint) -> Response:
        given = body.generation_fields()
        job = _Job(body, images, endpoint, new_header(await api.served_model(body.model, given)), given)
        responses = api.run(job.task(), request, job.header.id)
        if body.stream:
            pieces = _stream(responses, job)
            return sse.EventStream(await unless_gone(request, anext(pieces)), pieces)
        files = f"{str(request.base_url).rstrip('/')}{FILES}"
        async with aclosing(responses):
            reply = await unless_gone(request, _collect(responses, job, store, files))
        return Response(msgspec.json.encode(reply), media_type="application/json")

    async def file(request: Request) -> Response:
        name = request.path_params["name"]
        found = store.get(name)
        if found is None:
            gone = NotFound(f"{truncate(name)} is not there, or no longer: a URL works for {STORE_S:g} s", "name")
            return error_response(gone, api.settings.retry_after_s)
        headers = {"Cache-Control": "private, no-store", "X-Content-Type-Options": "nosniff"}
        return Response(found.data, headers=headers, media_type=f"image/{found.file_format}")

    return [
        Route("/v1/images/generations", generations, methods=["POST"]),
        Route("/v1/images/edits", edits, methods=["POST"]),
        Route(FILES + "{name}", file, methods=["GET"]),
    ]


async def _collect(
    responses: AsyncGenerator[StageResponse, None], job: _Job, store: ImageStore, files: str
) -> ImagesReply:
    body, thought, size = job.body, "", ""
    data: list[ImageData] = []
    done: DoneEvent | None = None
    async for response in responses:
        event = response.event
        if isinstance(event, ImageEvent) and response.image is not None:
            encoding = (response.image, body.file_format, body.compression)
            if body.response_format == "url":
                image = ImageData(event.seed, url=files + store.add(await encode(*encoding), body.file_format))
            else:
                image = ImageData(event.seed, b64_json=await encode_base64(*encoding))
            data.append(image)
            size = _size(event)
        elif isinstance(event, AnswerEvent):
            thought += event.reasoning
        elif isinstance(event, DoneEvent):
            done = event
    if done is None or not data:
        raise incomplete(job.header, "image")
    return ImagesReply(
        created=job.header.created,
        data=tuple(msgspec.structs.replace(image, revised_prompt=thought or None) for image in data),
        size=size,
        output_format=body.file_format,
        usage=usage(done.usage),
        model=job.header.model,
        seed=done.seed,
        metrics=metrics(done, job.header),
        quality=body.reported_quality or msgspec.UNSET,
    )


async def _stream(responses: AsyncGenerator[StageResponse, None], job: _Job) -> AsyncGenerator[bytes, None]:
    """The events of a streamed reply; finished images come last, as their usage is known only then."""
    thought = ""
    finished: list[StreamedImage] = []
    done: DoneEvent | None = None
    async with aclosing(responses):
        async for response in responses:
            event = response.event
            if isinstance(event, ProgressEvent):
                yield sse.progress(event)
            elif isinstance(event, PartialImageEvent) and response.image is not None:
                preview = await _streamed(job, response, event)
                yield sse.event(preview.type, preview)
            elif isinstance(event, ImageEvent) and response.image is not None:
                finished.append(await _streamed(job, response, event))
            elif isinstance(event, AnswerEvent):
                thought += event.reasoning
            elif isinstance(event, DoneEvent):
                done = event
    if done is None or not finished:
        raise incomplete(job.header, "image")
    for place, image in enumerate(finished):
        last = place == len(finished) - 1
        complete = msgspec.structs.replace(
            image, usage=usage(_share(done.usage, len(finished), last)), revised_prompt=thought or msgspec.UNSET
        )
        yield sse.event(complete.type, complete)


async def _streamed(job: _Job, response: StageResponse, event: ImageEvent | PartialImageEvent) -> StreamedImage:
    assert response.image is not None
    body, is_preview = job.body, isinstance(event, PartialImageEvent)
    return StreamedImage(
        type=f"{job.endpoint}.{'partial_image' if is_preview else 'completed'}",
        b64_json=await encode_base64(response.image, body.file_format, body.compression),
        created_at=int(time.time()),
        size=_size(event),
        quality=body.reported_quality or "auto",
        output_format=body.file_format,
        index=event.index,
        partial_image_index=event.partial_index if isinstance(event, PartialImageEvent) else msgspec.UNSET,
        seed=event.seed if isinstance(event, ImageEvent) else msgspec.UNSET,
    )


def _size(event: ImageEvent | PartialImageEvent) -> str:
    return f"{event.width}x{event.height}"


def usage(counts: StageUsage) -> ImagesUsage:
    """``counts`` in the images API's names."""
    output = counts.image_tokens + counts.text_tokens
    read = TokensDetails(counts.prompt_image_tokens, counts.prompt_tokens - counts.prompt_image_tokens)
    made = TokensDetails(counts.image_tokens, counts.text_tokens)
    return ImagesUsage(counts.prompt_tokens, read, output, made, counts.prompt_tokens + output)


def _share(counts: StageUsage, images: int, is_last: bool) -> StageUsage:
    """One image's part of the counts: its own latents, and all the rest for the last, so that they add up."""
    own = counts.image_tokens // images
    if not is_last:
        return StageUsage(image_tokens=own)
    return msgspec.structs.replace(counts, image_tokens=counts.image_tokens - own * (images - 1))
