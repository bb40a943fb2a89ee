"""Messages of sleep, wake and drain to the orchestrator."""

from __future__ import annotations

from typing import Literal

import msgspec

from bagel_triton.protocol.errors import InvalidRequest
from bagel_triton.protocol.messages import Message

Level = Literal[1, 2]
State = Literal["awake", "falling asleep", "asleep", "waking", "draining", "drained"]


class SleepCall(Message, frozen=True):
    """A change of the server's state, or a question about it; ``level`` is that of a sleep.

    A server that drains refuses new requests until it is resumed.
    """

    action: Literal["sleep", "wake", "state", "drain", "resume"]
    level: Level = 1


class SleepState(Message, frozen=True):
    """The server's state; ``level`` is 0 when it is awake. ``while_asleep`` is what becomes of new requests.

    A server is ``draining`` while it has requests in flight, and ``drained`` when it has none, asleep or awake.
    """

    state: State
    level: Literal[0, 1, 2] = 0
    while_asleep: Literal["wait", "refuse"] = "wait"


def decode_sleep_call(data: bytes) -> SleepCall:
    """The call in JSON ``data``.

    Raises:
        InvalidRequest: it is none.
    """
    try:
        return msgspec.json.decode(data, type=SleepCall)
    except msgspec.DecodeError as error:
        raise InvalidRequest(f"input sleep is not a SleepCall: {error}", "sleep") from error
