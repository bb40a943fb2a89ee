"""Bodies of popular clients against a real server: each gets its text, its image, or a refusal by field."""

from __future__ import annotations

import pytest

from tests.support.request_shapes import SHAPES, Shape
from tests.support.serving import Server


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name[:60])
def test_a_clients_body_gets_the_reply_that_it_requests(server: Server, shape: Shape) -> None:
    reply = server.chat(shape.body)
    if shape.gives:
        assert reply.status_code == 200, reply.text[:500]
        message = reply.json()["choices"][0]["message"]
        assert ("images" in message) == (shape.gives == "image")
    else:
        assert reply.status_code == 400, reply.text[:500]
        assert shape.names in reply.json()["error"]["param"]
