"""Every error a client can meet, typed where it happens and mapped once.

Triton carries an error between models and to clients as one string. So each error has a
text form, ``GRPC_STATUS: Kind(param): message``, which :func:`from_text` reads back even if
Triton has wrapped it (an ensemble adds a prefix).
"""

from __future__ import annotations

import codecs
import difflib
import json
import re
from collections.abc import Iterable, Iterator
from typing import ClassVar

# Triton has no code for a full queue or a deadline.
_TRITON_CODES = {
    "INVALID_ARGUMENT": "INVALID_ARG",
    "RESOURCE_EXHAUSTED": "UNAVAILABLE",
    "DEADLINE_EXCEEDED": "CANCELLED",
}
NEAR = 0.75  # least similarity of a name to the one it is suggested for


class BagelError(Exception):
    """Base of the errors that cross a stage boundary."""

    http_status: ClassVar[int] = 500
    openai_type: ClassVar[str] = "server_error"
    grpc_status: ClassVar[str] = "INTERNAL"

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = None if param is None else truncate(param)

    @property
    def kind(self) -> str:
        return type(self).__name__

    @property
    def triton_code(self) -> str:
        """Triton's code nearest to ``grpc_status``."""
        return _TRITON_CODES.get(self.grpc_status, self.grpc_status)

    def to_text(self) -> str:
        """The text form. Triton's streams carry no status, and it has fewer codes than gRPC."""
        param = re.sub(r"[()\n]", "?", self.param or "")  # user input; these characters delimit it
        return f"{self.grpc_status}: {self.kind}({param}): {self.message}"


class InvalidRequest(BagelError):
    """The request cannot be served as written; ``param`` names the field."""

    http_status = 400
    openai_type = "invalid_request_error"
    grpc_status = "INVALID_ARGUMENT"

    @classmethod
    def value(cls, param: str, value: object, allowed: str) -> InvalidRequest:
        """An error that names the field, its value and what is allowed."""
        return cls(f"{truncate(param)}={format_value(value)} is not allowed; allowed: {allowed}", param)

    @classmethod
    def unknown(cls, param: str, name: str, known: Iterable[str]) -> InvalidRequest:
        """An error for the unknown field ``name`` at ``param``, with the nearest of ``known`` as a suggestion."""
        allowed = list(known)
        near = difflib.get_close_matches(truncate(name), allowed, n=1, cutoff=NEAR)
        suggestion = f"did you mean {near[0]}? " if near else ""
        return cls(f"{truncate(param)} is not a known field; {suggestion}allowed: {', '.join(allowed)}", param)


class ModelNotFound(InvalidRequest):
    """The request names a model that is not served here."""

    http_status = 404
    grpc_status = "NOT_FOUND"


class Overloaded(BagelError):
    """A bounded queue or the KV cache stayed full; the client may retry."""

    http_status = 429
    openai_type = "rate_limit_error"
    grpc_status = "RESOURCE_EXHAUSTED"


class DeadlineExceeded(BagelError):
    """The request's timeout passed."""

    http_status = 504
    openai_type = "timeout_error"
    grpc_status = "DEADLINE_EXCEEDED"


class Cancelled(BagelError):
    """The client left or aborted the request."""

    http_status = 499
    openai_type = "cancelled"
    grpc_status = "CANCELLED"


class StageUnavailable(BagelError):
    """A stage is not loaded, died, or stayed silent past its deadline."""

    http_status = 503
    openai_type = "service_unavailable_error"
    grpc_status = "UNAVAILABLE"


class Asleep(StageUnavailable):
    """The server sleeps, and refuses requests meanwhile; the client may retry."""


class LeaseError(BagelError):
    """A KV lease was stale, expired, released or did not match its contents.

    The request itself is valid and may be retried.
    """

    http_status = 503
    openai_type = "service_unavailable_error"
    grpc_status = "UNAVAILABLE"


class Internal(BagelError):
    """A defect of the server, not of the request."""


_KINDS: dict[str, type[BagelError]] = {
    kind.__name__: kind
    for kind in (
        InvalidRequest,
        ModelNotFound,
        Overloaded,
        DeadlineExceeded,
        Cancelled,
        StageUnavailable,
        Asleep,
        LeaseError,
        Internal,
    )
}
# The HTTP status of every way a request can end.
STATUSES = ("200", *sorted({str(kind.http_status) for kind in _KINDS.values()}))
# Messages of Triton and its client about a model that is not there, has died or is being stopped.
_GONE = (
    "is not healthy",
    "is not ready",
    "Server not ready",
    "Server is stopping",
    "StatusCode.UNAVAILABLE",
    "The stream is no longer in valid state",
)
_UNKNOWN = re.compile(r"unknown model: '(\w+)'")  # to Triton; the names are ours, so it is not loaded now
_TEXT = re.compile(rf"\b({'|'.join(_KINDS)})\(([^()\n]*)\): (.*)", re.DOTALL)


def from_text(text: str) -> BagelError:
    """The typed error in ``text``; text of any other origin becomes :class:`Internal`.

    Triton's message for a dead stub, an unloaded model or a stopping server becomes
    :class:`StageUnavailable`.
    """
    found = _TEXT.search(text)
    if found:
        return _KINDS[found[1]](found[3], found[2] or None)
    if unknown := _UNKNOWN.search(text):
        return StageUnavailable(f"{unknown[1]} is unavailable: it is being loaded again; try again in a few seconds")
    if any(words in text for words in _GONE):
        return StageUnavailable(text)
    return Internal(text)


def from_exception(error: BaseException) -> BagelError:
    """``error`` itself if typed; :class:`Internal` naming its type otherwise.

    An exception of Triton's client carries Triton's text.
    """
    if isinstance(error, BagelError):
        return error
    if type(error).__name__ == "InferenceServerException":  # by name: most of the package does not import the client
        return from_text(str(error))
    return Internal(f"{type(error).__name__}: {error}")


MAX_SHOWN = 120  # characters


def truncate(text: str) -> str:
    """``text``, shortened if it is too long for an error."""
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 3]}..."


def format_value(value: object) -> str:
    """``value`` as errors show it: text in quotes, bytes as text if they are text, everything else as JSON.

    A long value is shortened without reading all of it.
    """
    if isinstance(value, bytes):
        text = _decoded(value)
        return f"{len(value)} byte{'' if len(value) == 1 else 's'}" if text is None else format_value(text)
    if isinstance(value, str):
        return truncate(repr(value[: MAX_SHOWN + 1]))
    written = ""
    for piece in _json(value):
        written += piece
        if len(written) > MAX_SHOWN:
            break
    return truncate(written)


def _decoded(data: bytes) -> str | None:
    """The beginning of ``data`` as text; None if it is not printable UTF-8."""
    head = data[: 4 * (MAX_SHOWN + 1)]  # a character has at most 4
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head, final=len(head) == len(data))
    except UnicodeDecodeError:
        return None
    return text if all(character.isprintable() or character.isspace() for character in text) else None


def _json(value: object) -> Iterator[str]:
    """``value`` as JSON, in pieces: ``json`` itself would write a long value to its end."""
    if isinstance(value, dict):
        yield "{"
        for number, (name, member) in enumerate(value.items()):
            yield f"{', ' if number else ''}{_quoted(str(name))}: "
            yield from _json(member)
        yield "}"
    elif isinstance(value, list | tuple):
        yield "["
        for number, item in enumerate(value):
            yield ", " if number else ""
            yield from _json(item)
        yield "]"
    elif isinstance(value, str):
        yield _quoted(value)
    elif value is None or isinstance(value, bool | int | float):
        yield json.dumps(value)
    else:
        yield repr(value)


def _quoted(text: str) -> str:
    head = text[: MAX_SHOWN + 1]
    return json.dumps(head, ensure_ascii=not head.isprintable())  # replies must not hold lone surrogates
