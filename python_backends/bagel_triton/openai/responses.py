"""``POST /v1/responses``: text and images, with the Responses API's items and events, and no state."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Any, Literal

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from bagel_triton.openai import sse
from bagel_triton.openai.chat import Task, with_end
from bagel_triton.openai.endpoint import Api, unless_gone
from bagel_triton.openai.errors import error_body, to_bagel_error
from bagel_triton.openai.image_io import encode_base64
from bagel_triton.openai.reply import Header, incomplete, metrics
from bagel_triton.openai.responses_schema import ResponsesBody, parse
from bagel_triton.protocol.events import (
    AnswerEvent,
    DoneEvent,
    ImageEvent,
    PartialImageEvent,
    ProgressEvent,
    TextEvent,
)
from bagel_triton.protocol.messages import Usage
from bagel_triton.protocol.request import Turn
from bagel_triton.triton.client import StageResponse

Json = dict[str, Any]
# The API's own error codes, by HTTP status; every other is a server_error.
_CODES = {400: "invalid_prompt", 404: "invalid_prompt", 429: "rate_limit_exceeded"}


def routes(api: Api) -> list[Route]:
    """The endpoint's route."""

    @api.endpoint
    async def responses(request: Request) -> Response:
        body = await api.parse(request, parse)
        task = to_task(body)
        model = await api.served_model(body.model, task.given)
        header = Header(f"resp_{uuid.uuid4().hex}", int(time.time()), model, time.perf_counter())
        stages = api.run(task, request, header.id)
        reply = _Reply(body, header)
        if body.stream:
            pieces = _stream(stages, reply)
            return sse.EventStream(await unless_gone(request, anext(pieces)), pieces)
        async with aclosing(stages):
            await unless_gone(request, _collect(stages, reply))
        return Response(msgspec.json.encode(reply.response), media_type="application/json")

    return [Route("/v1/responses", responses, methods=["POST"])]


def to_task(body: ResponsesBody) -> Task:
    """The model's request that ``body`` is.

    Raises:
        InvalidRequest: names the field that is not allowed.
    """
    turns, images, texts = body.conversation()
    modality: Literal["image", "text"] = "text" if body.image_tool is None else "image"
    turns = turns or (Turn("user", ()),)  # items that add nothing are an empty question
    given = body.generation_fields()
    texts |= {"messages": "input", "max_tokens": given.written.get("max_tokens", "max_output_tokens")}
    return Task(modality, with_end(turns, modality, body), images, given, texts)


async def _collect(stages: AsyncGenerator[StageResponse, None], reply: _Reply) -> None:
    async for response in stages:
        await reply.add(response)
    reply.finish()


async def _stream(stages: AsyncGenerator[StageResponse, None], reply: _Reply) -> AsyncGenerator[bytes, None]:
    """The events of the reply; the first waits for the model, so that an error before it has its HTTP status."""
    started = False
    async with aclosing(stages):
        try:
            async for response in stages:
                if not started:
                    started = True
                    for event in reply.start():
                        yield sse.event(event["type"], event)
                if isinstance(response.event, ProgressEvent):
                    yield sse.progress(response.event)
                for event in await reply.add(response):
                    yield sse.event(event["type"], event)
            last = reply.finish()
        except Exception as error:
            if not started:
                raise
            last = reply.fail(error)
    for event in last:
        yield sse.event(event["type"], event)


class _Reply:
    """The response object as it grows, and the events that say how."""

    def __init__(self, body: ResponsesBody, header: Header) -> None:
        self._body, self._header = body, header
        self._number = 0
        self._reasoning: Json | None = None
        self._message: Json | None = None
        self._calls: dict[int, Json] = {}  # by the image's index
        self._thought = ""
        self._reason: str | None = None
        self._done: DoneEvent | None = None
        self.response: Json = self._opening()

    def _opening(self) -> Json:
        body = self._body
        reasoning = body.reasoning
        return {
            "id": self._header.id,
            "object": "response",
            "created_at": self._header.created,
            "status": "in_progress",
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": {},
            "model": self._header.model,
            "output": [],
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "reasoning": {
                "effort": None if reasoning is None else reasoning.effort,
                "summary": None if reasoning is None else reasoning.summary or reasoning.generate_summary,
            },
            "store": False,
            "temperature": getattr(body, "temperature", None),
            "text": {"format": {"type": "text"}},
            "tool_choice": "auto" if body.tool_choice is None else body.tool_choice,
            "tools": [tool.model_dump(exclude_none=True) for tool in body.tools],
            "top_p": getattr(body, "top_p", None),
            "truncation": "disabled",
            "usage": None,
        }

    def start(self) -> list[Json]:
        """The events that open a stream."""
        opening = self._snapshot()
        return [
            self._event("response.created", response=opening),
            self._event("response.in_progress", response=opening),
        ]

    async def add(self, response: StageResponse) -> list[Json]:
        """The events for one response of the model."""
        event = response.event
        if isinstance(event, TextEvent):
            return list(self._add_thought(event.text) if event.channel == "reasoning" else self._add_text(event.text))
        if isinstance(event, AnswerEvent):
            return list(self._close_answer(event))
        if isinstance(event, PartialImageEvent) and response.image is not None:
            data = await self._encoded(response)
            return [*self._open_call(event.index), self._partial_image(event, data)]
        if isinstance(event, ImageEvent) and response.image is not None:
            data = await self._encoded(response)
            return [*self._open_call(event.index), *self._close_call(event, data)]
        if isinstance(event, ProgressEvent) and event.stage == "dit" and event.steps and self._body.image_tool:
            return list(self._open_call(0))
        if isinstance(event, DoneEvent):
            self._done = event
        return []

    def finish(self) -> list[Json]:
        """The last events of a reply that succeeded.

        Raises:
            Internal: the model ended without the requested output.
        """
        wanted = self._calls if self._body.image_tool else self._message
        unfinished = any(item["status"] == "in_progress" for item in self.response["output"])
        if self._done is None or not wanted or unfinished:
            raise incomplete(self._header, "image" if self._body.image_tool else "text")
        # OpenAI's Agents SDK takes calls without a message for half a turn, and requests the image again.
        last = [*self._open_message(), *self._close_message("", "completed")] if self._body.image_tool else []
        is_whole = self._reason != "length"
        self.response |= {
            "status": "completed" if is_whole else "incomplete",
            "incomplete_details": None if is_whole else {"reason": "max_output_tokens"},
            "completed_at": int(time.time()),
            "usage": usage(self._done.usage),
            "seed": self._done.seed,
            "metrics": metrics(self._done, self._header),
        }
        kind = "response.completed" if is_whole else "response.incomplete"
        return [*last, self._event(kind, response=self.response)]

    def fail(self, error: Exception) -> list[Json]:
        """The last event of a stream that failed."""
        typed = to_bagel_error(error)
        detail = error_body(typed).error
        code = _CODES.get(typed.http_status, "server_error")
        self.response |= {
            "status": "failed",
            "error": {"code": code, "message": detail.message, "param": detail.param, "type": detail.type},
        }
        for item in self.response["output"]:
            if item["status"] == "in_progress":
                item["status"] = "failed" if item["type"] == "image_generation_call" else "incomplete"
        return [self._event("response.failed", response=self.response)]

    # Thinking and text

    def _add_thought(self, text: str) -> Iterator[Json]:
        self._thought += text
        if self._reasoning is None:
            self._reasoning = {"id": _id("rs"), "type": "reasoning", "summary": [], "status": "in_progress"}
            yield self._item_added(self._reasoning)
            part = {"type": "summary_text" if self._body.summarises else "reasoning_text", "text": ""}
            yield self._thought_event("part.added", part=part)
        yield self._thought_event("text.delta", delta=text)

    def _close_thought(self, whole: str) -> Iterator[Json]:
        item, self._thought = self._reasoning, whole or self._thought
        if item is None or item["status"] != "in_progress":
            return
        part = {"type": "summary_text" if self._body.summarises else "reasoning_text", "text": self._thought}
        yield self._thought_event("text.done", text=self._thought)
        yield self._thought_event("part.done", part=part)
        item |= {"summary" if self._body.summarises else "content": [part], "status": "completed"}
        yield self._item_done(item)

    def _thought_event(self, kind: str, **data: Any) -> Json:
        assert self._reasoning is not None
        if self._body.summarises:
            name = f"response.reasoning_summary_{kind}"
            data["summary_index"] = 0
        else:
            name = f"response.content_{kind}" if kind.startswith("part") else f"response.reasoning_{kind}"
            data["content_index"] = 0
        return self._event(name, **self._place(self._reasoning), **data)

    def _open_message(self) -> Iterator[Json]:
        self._message = {"id": _id("msg"), "type": "message", "role": "assistant", "status": "in_progress"}
        self._message["content"] = []
        yield self._item_added(self._message)
        part = {"type": "output_text", "text": "", "annotations": []}
        yield self._event("response.content_part.added", **self._place(self._message), content_index=0, part=part)

    def _add_text(self, text: str) -> Iterator[Json]:
        if self._message is None:
            yield from self._close_thought("")
            yield from self._open_message()
        assert self._message is not None
        yield self._event(
            "response.output_text.delta", **self._place(self._message), content_index=0, delta=text, logprobs=[]
        )

    def _close_answer(self, answer: AnswerEvent) -> Iterator[Json]:
        """Close what ``answer`` says as a whole; one that was not streamed is opened first."""
        if answer.reasoning and self._reasoning is None:
            yield from self._add_thought(answer.reasoning)
        yield from self._close_thought(answer.reasoning)
        if self._body.image_tool is not None:
            return
        if self._message is None:
            yield from self._add_text(answer.content)
        status = "incomplete" if answer.finish_reason == "length" else "completed"
        yield from self._close_message(answer.content, status)
        self._reason = answer.finish_reason

    def _close_message(self, text: str, status: str) -> Iterator[Json]:
        assert self._message is not None
        place = {**self._place(self._message), "content_index": 0}
        part = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
        yield self._event("response.output_text.done", **place, text=text, logprobs=[])
        yield self._event("response.content_part.done", **place, part=part)
        self._message |= {"content": [part], "status": status}
        yield self._item_done(self._message)

    # Images

    def _open_call(self, index: int) -> Iterator[Json]:
        if index in self._calls:
            return
        call = {"id": _id("ig"), "type": "image_generation_call", "status": "in_progress", "result": None}
        self._calls[index] = call
        yield self._item_added(call)
        for step in ("in_progress", "generating"):
            yield self._event(f"response.image_generation_call.{step}", **self._place(call))

    def _partial_image(self, event: PartialImageEvent, data: str) -> Json:
        return self._event(
            "response.image_generation_call.partial_image",
            **self._place(self._calls[event.index]),
            **self._looks(event),
            partial_image_index=event.partial_index,
            partial_image_b64=data,
        )

    def _close_call(self, event: ImageEvent, data: str) -> Iterator[Json]:
        call = self._calls[event.index]
        yield self._event("response.image_generation_call.completed", **self._place(call))
        has_images = bool(self._body.conversation()[1])
        call |= {
            "status": "completed",
            "result": data,
            "action": "edit" if has_images else "generate",
            "seed": event.seed,
            **self._looks(event),
        }
        if self._thought:
            call["revised_prompt"] = self._thought
        yield self._item_done(call)

    def _looks(self, event: ImageEvent | PartialImageEvent) -> Json:
        tool = self._body.image_tool
        assert tool is not None
        return {
            "size": f"{event.width}x{event.height}",
            "output_format": tool.file_format,
            "background": "opaque",
            "quality": tool.quality or "auto",
        }

    async def _encoded(self, response: StageResponse) -> str:
        tool = self._body.image_tool
        assert tool is not None, "images come only with the tool"
        assert response.image is not None
        return await encode_base64(response.image, tool.file_format, tool.compression)

    # Events

    def _item_added(self, item: Json) -> Json:
        self.response["output"].append(item)
        return self._event("response.output_item.added", output_index=self._index(item), item=dict(item))

    def _item_done(self, item: Json) -> Json:
        return self._event("response.output_item.done", output_index=self._index(item), item=dict(item))

    def _place(self, item: Json) -> Json:
        return {"item_id": item["id"], "output_index": self._index(item)}

    def _index(self, item: Json) -> int:
        return next(index for index, known in enumerate(self.response["output"]) if known is item)

    def _snapshot(self) -> Json:
        return {**self.response, "output": list(self.response["output"])}

    def _event(self, kind: str, **data: Any) -> Json:
        number, self._number = self._number, self._number + 1
        return {"type": kind, "sequence_number": number, **data}


def _id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"


def usage(counts: Usage) -> Json:
    """``counts`` in the Responses API's names; it has no name for the tokens of images alone."""
    output = counts.text_tokens + counts.image_tokens
    return {
        "input_tokens": counts.prompt_tokens,
        "input_tokens_details": {
            "cached_tokens": 0,
            "cache_write_tokens": 0,
            "image_tokens": counts.prompt_image_tokens,
        },
        "output_tokens": output,
        "output_tokens_details": {"reasoning_tokens": counts.reasoning_tokens, "image_tokens": counts.image_tokens},
        "total_tokens": counts.prompt_tokens + output,
    }
