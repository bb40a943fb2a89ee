"""``POST /v1/chat/completions``."""

from __future__ import annotations

from contextlib import aclosing

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from bagel_triton.openai import schema, stream
from bagel_triton.openai.chat import reply_options, to_task
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
        options = reply_options(body, task.modality, request.headers, api.settings.http.image_reply)
        if body.stream:
            chunks = stream.chunks(responses, header, options)
            return stream.event_stream(await unless_gone(request, anext(chunks)), chunks)
        async with aclosing(responses):
            completion = await unless_gone(request, collect(responses, header, options))
        return Response(msgspec.json.encode(completion), media_type="application/json")

    return [Route("/v1/chat/completions", chat_completions, methods=["POST"])]
