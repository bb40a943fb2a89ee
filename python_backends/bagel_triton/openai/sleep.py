"""Sleep and wake over HTTP, behind an admin key; under vLLM's paths too."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from bagel_triton.openai.admin import check_key, json_body
from bagel_triton.openai.endpoint import Api, unless_gone
from bagel_triton.protocol.errors import InvalidRequest
from bagel_triton.protocol.sleep import Level, SleepCall, SleepState


def routes(api: Api) -> list[Route]:
    """The routes."""

    async def change(request: Request, call: SleepCall) -> SleepState:
        check_key(api)
        return await unless_gone(request, api.client.sleep(call))

    @api.endpoint
    async def state(request: Request) -> Response:
        return _json(await change(request, SleepCall("state")))

    @api.endpoint
    async def sleep(request: Request) -> Response:
        return _json(await change(request, SleepCall("sleep", await _level(request))))

    @api.endpoint
    async def wake(request: Request) -> Response:
        _check_query(request, ())
        return _json(await change(request, SleepCall("wake")))

    @api.endpoint
    async def is_sleeping(request: Request) -> Response:
        found = await change(request, SleepCall("state"))
        return JSONResponse({"is_sleeping": found.level > 0})

    async def state_or_sleep(request: Request) -> Response:
        return await (sleep if request.method == "POST" else state)(request)

    return [
        Route("/v1/sleep", state_or_sleep, methods=["GET", "POST"]),  # one route: its 405 lists both
        Route("/v1/wake", wake, methods=["POST"]),
        Route("/sleep", sleep, methods=["POST"]),
        Route("/wake_up", wake, methods=["POST"]),
        Route("/is_sleeping", is_sleeping, methods=["GET"]),
    ]


def _check_query(request: Request, known: Sequence[str]) -> None:
    """Refuse parameters that would change what happens, such as vLLM's ``mode`` and ``tags``."""
    for name, value in request.query_params.multi_items():
        if name not in known:
            allowed = (
                f"only {', '.join(known)}" if known else "no parameters; all of the model sleeps and wakes at once"
            )
            raise InvalidRequest(f"{name}={value!r} is not a parameter of {request.url.path}; allowed: {allowed}", name)


async def _level(request: Request) -> Level:
    """The level in the query or in a JSON body; 1 without one.

    Raises:
        InvalidRequest: it is neither 1 nor 2, or the body is none.
    """
    _check_query(request, ("level",))
    given: object = request.query_params.get("level")
    if given is None:
        found = await json_body(request, ["level"], '{"level": 1} or 2')
        given = 1 if found.get("level") is None else found["level"]
    levels: dict[object, Level] = {1: 1, 2: 2, "1": 1, "2": 2}
    if isinstance(given, bool) or not isinstance(given, int | str) or given not in levels:
        raise InvalidRequest.value("level", given, "1 (weights stay in host memory) or 2 (weights are dropped)")
    return levels[given]


def _json(state: SleepState) -> Response:
    return Response(msgspec.json.encode(state), media_type="application/json")
