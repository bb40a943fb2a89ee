"""Fields of OpenAI's API for what the model cannot do, which many clients send to say that they do not want it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import BeforeValidator

from bagel_triton.proxy.violation import not_allowed

# The one value of each, besides null, that asks for nothing.
NEUTRAL: dict[str, Any] = {
    "frequency_penalty": 0,
    "logit_bias": {},
    "logprobs": False,
    "metadata": {},
    "presence_penalty": 0,
    "response_format": {"type": "text"},
    "store": False,
    "tool_choice": "none",
    "tools": [],
}


def _only(neutral: Any) -> Callable[[Any], Any]:
    def check(value: Any) -> Any:
        if value is None or (value == neutral and isinstance(value, bool) == isinstance(neutral, bool)):
            return value
        raise not_allowed(json.dumps(neutral))

    return check


NEUTRAL_FIELDS: dict[str, Any] = {
    name: (Annotated[Any, BeforeValidator(_only(value))], None) for name, value in NEUTRAL.items()
}
