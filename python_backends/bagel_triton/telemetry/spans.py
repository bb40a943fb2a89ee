"""What a request tells of its way through the stages, to whoever draws it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from bagel_triton.protocol.messages import Answer, FlowSettings, Plan

Attributes = Mapping[str, str | int | float | bool]


class Span(Protocol):
    """A stretch of a request's time; calls neither block nor fail."""

    def set_attributes(self, attributes: Attributes) -> None:
        """Attributes of the span."""

    def child(self, name: str, started_at: float) -> AbstractContextManager[Span]:
        """A span within this one, from ``started_at`` (Unix seconds) to the block's end.

        An exception that leaves the block is what the span failed of.
        """


class NoSpan:
    """Nobody looks."""

    def set_attributes(self, attributes: Attributes) -> None:
        """Do nothing."""

    @contextmanager
    def child(self, name: str, started_at: float) -> Iterator[NoSpan]:
        """Do nothing around the block."""
        yield self


def request_attributes(plan: Plan) -> Attributes:
    """What is asked for: kind, sizes and counts, never its words."""
    decoding = plan.decoding
    text = {} if decoding is None else {"max_new_tokens": decoding.max_new_tokens, "texts": len(decoding.seeds)}
    return {
        "unique_request_id": plan.request_id,  # of equal ids that clients gave, each is told apart
        "modality": "text" if plan.flow is None else "image",
        "prompt_tokens": plan.usage.prompt_tokens,
        "priority": plan.schedule.priority,
        **text,
        **image_attributes(plan.flow),
    }


def size_attributes(flow: FlowSettings | None) -> Attributes:
    """The size of the images that are asked for, if any are."""
    return {} if flow is None else {"height": flow.height, "width": flow.width}


def image_attributes(flow: FlowSettings | None) -> Attributes:
    """The images that are asked for, if any are."""
    if flow is None:
        return {}
    return {
        **size_attributes(flow),
        "num_inference_steps": flow.num_inference_steps,
        "images": flow.num_images,
        "cache": flow.cache,
    }


def text_attributes(answers: Sequence[Answer]) -> Attributes:
    """The texts that were decoded."""
    return {
        "text_tokens": sum(answer.tokens for answer in answers),
        "reasoning_tokens": sum(answer.reasoning_tokens for answer in answers),
    }
