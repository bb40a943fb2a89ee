"""The id of the request at hand: taken from the client or made here, in the reply, the log and errors."""

from __future__ import annotations

import logging
import re
import uuid
from contextvars import ContextVar

from bagel_triton.telemetry import tracing

HEADER = tracing.REQUEST_ID
CURRENT: ContextVar[str | None] = ContextVar("request_id", default=None)
_ALLOWED = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")


def take(given: str | None) -> str:
    """``given`` if it is fit for a header and a log line, else a new id.

    A client's id identifies nothing here but its own lines in the log: two requests may share one.
    """
    return given if given is not None and _ALLOWED.fullmatch(given) else f"req_{uuid.uuid4().hex}"


class RequestIdFilter(logging.Filter):
    """Puts the current request's id at the end of each line of the log."""

    def filter(self, record: logging.LogRecord) -> bool:
        if (current := CURRENT.get()) is not None and not getattr(record, "has_request_id", False):
            record.msg = f"{record.getMessage()} [{current}]"
            record.args = None
            record.has_request_id = True
        return True
