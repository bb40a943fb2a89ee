"""``POST /v1/chat/completions``."""

from __future__ import annotations

from contextlib import aclosing

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from bagel_triton.openai import schema, stream
from bagel_triton.openai.chat import to_task
from bagel_triton.openai.endpoint import Api, unless_gone
from bagel_triton.openai.reply import collect, new_header


def routes(api: Api) -> list[Route]:
    """The endpoint's route."""

    @api.endpoint
    async def chat_completions(request: Request) -> Response:
        body = await api.parse(request, schema.parse)
        header = new_header(api.served_model(body.model))
        task = to_task(body)
        responses = api.run(task, request, header.id)
        if body.stream:
            include_usage = bool(body.stream_options and body.stream_options.include_usage)
            chunks = stream.chunks(responses, header, task.modality, include_usage)
            return stream.EventStream(await unless_gone(request, anext(chunks)), chunks)
        async with aclosing(responses):
            completion = await unless_gone(request, collect(responses, header, task.modality))
        return Response(msgspec.json.encode(completion), media_type="application/json")

    return [Route("/v1/chat/completions", chat_completions, methods=["POST"])]
