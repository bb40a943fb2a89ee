"""Triton's objects as typed values and back: the only module that knows ``pb_utils``."""

from __future__ import annotations

import json
import logging
import queue
import threading
import time
from collections.abc import Callable, Collection
from concurrent.futures import Future
from typing import Any, TypeVar

import numpy as np
import triton_python_backend_utils as pb_utils

from bagel_triton.protocol.errors import BagelError, Cancelled, InvalidRequest, from_exception
from bagel_triton.protocol.events import Event, StageStats, encode_event, encode_stats
from bagel_triton.protocol.messages import Message, Pulse, decode, encode
from bagel_triton.protocol.request import REQUEST_FIELDS
from bagel_triton.protocol.tensors import Array, Arrays
from bagel_triton.telemetry import tracing

M = TypeVar("M", bound=Message)
# Parameters that the protocol itself knows; every other one was meant as an input.
TRITON_PARAMETERS = ("id", "priority", "timeout", "sequence_id", "sequence_start", "sequence_end")
Result = TypeVar("Result")
CANCEL_POLL_S = 0.25
_ASKING = threading.Lock()
log = logging.getLogger(__name__)


class LogHandler(logging.Handler):
    """Python's logging into Triton's log."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record at Triton's level."""
        levels = {logging.WARNING: pb_utils.Logger.log_warn, logging.ERROR: pb_utils.Logger.log_error}
        levels.get(record.levelno, pb_utils.Logger.log_info)(self.format(record))


def use_triton_log() -> None:
    """Send the package's log records to Triton's log."""
    handler = LogHandler()
    handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
    logger = logging.getLogger("bagel_triton")
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.INFO)


def arrays_of(request: Any) -> Arrays:
    """The request's inputs by name; BYTES become object arrays."""
    return {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}


def parameters_of(request: Any) -> dict[str, Any]:
    """The request's parameters; Triton adds the headers that it is told to forward."""
    return dict(json.loads(request.parameters() or "{}"))


def refuse_parameters(request: Any, allowed: Collection[str]) -> None:
    """Refuse what Triton made a request parameter of: a field that is no input of the model.

    Raises:
        InvalidRequest: names the field and the ``allowed`` ones.
    """
    for name in parameters_of(request):
        known = name.startswith("triton_") or name in TRITON_PARAMETERS or name.lower() in tracing.HEADERS
        if not known and name in REQUEST_FIELDS:
            raise InvalidRequest(f"{name} is no field of this model; allowed: {', '.join(allowed)}", name)
        if not known:
            raise InvalidRequest.unknown(name, name, allowed)


def text_of(arrays: Arrays, name: str) -> str:
    """The text in a BYTES [1] input.

    Raises:
        InvalidRequest: it is not UTF-8.
    """
    try:
        return bytes(arrays[name].reshape(-1)[0]).decode()
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"input {name} is not UTF-8: {error}", name) from error


def message_of(arrays: Arrays, name: str, kind: type[M]) -> M:
    """The message in the BYTES [1] input ``name``.

    Raises:
        InvalidRequest: the input is missing or is not such a message.
    """
    if name not in arrays:
        raise InvalidRequest(f"input {name} is required", name)
    try:
        return decode(bytes(arrays[name].reshape(-1)[0]), kind)
    except ValueError as error:
        raise InvalidRequest(f"input {name} is not a {kind.__name__}: {error}", name) from error


def bytes_array(data: bytes) -> Array:
    """A BYTES [1] tensor's array."""
    return np.array([data], dtype=np.object_)


def message_array(message: Message) -> Array:
    """The BYTES [1] form of a message between stages."""
    return bytes_array(encode(message))


def response(arrays: Arrays, requested: Collection[str] = ()) -> Any:
    """A response with those of ``arrays`` that are ``requested``; with all of them if none is named.

    Triton drops other outputs itself, but until 24.12 it frees their NumPy arrays without
    holding the GIL, which corrupts the heap (python_backend pull request 390).
    """
    wanted = {name: array for name, array in arrays.items() if not requested or name in requested}
    return pb_utils.InferenceResponse([pb_utils.Tensor(name, array) for name, array in wanted.items()])


def error_response(error: BaseException) -> Any:
    """The response that carries ``error``, typed and with its Triton code."""
    typed = from_exception(error)
    code = getattr(pb_utils.TritonError, typed.triton_code)
    return pb_utils.InferenceResponse([], pb_utils.TritonError(typed.to_text(), code))


class Outbox:
    """Sends responses from a thread of its own, so that no engine waits for a client."""

    def __init__(self) -> None:
        self._sends: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="outbox", daemon=True)
        self._thread.start()

    def put(self, send: Callable[[], None]) -> None:
        """Queue one send."""
        self._sends.put(send)

    def close(self) -> None:
        """Send what is queued, then stop."""
        self._sends.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (send := self._sends.get()) is not None:
            try:
                send()
            except Exception:  # the client has gone; the others' responses still have to go out
                log.warning("a response could not be sent", exc_info=True)


class Reply:
    """The answer to one request of a decoupled model: events, then exactly one final flag."""

    def __init__(self, request: Any, outbox: Outbox) -> None:
        self.request_id: str = request.request_id()
        self._requested: frozenset[str] = frozenset(request.requested_output_names())
        self.in_ensemble: bool = "pulse" in self._requested and "event" not in self._requested
        self._pulse: Arrays = {}  # what every response to an ensemble carries, the last one too
        self._sender = request.get_response_sender()
        self._outbox = outbox
        self._cancelled, self._asked_at = False, time.monotonic()
        self._ended, self._ending = False, threading.Lock()

    def cancelled(self, at_most_s: float = CANCEL_POLL_S) -> bool:
        """Whether the client has cancelled the request, as of at most ``at_most_s`` ago.

        Triton answers this from another process, over the queue that carries responses: it is
        asked seldom, by one thread at a time, and not after the last response, with which it
        forgets the request.
        """
        now = time.monotonic()
        if not self._cancelled and now - self._asked_at >= at_most_s:
            self._asked_at = now
            with self._ending, _ASKING:
                self._cancelled = not self._ended and bool(self._sender.is_cancelled())
        return self._cancelled

    def send(self, arrays: Arrays) -> None:
        """One response of several."""
        if not self._requested or not self._requested.isdisjoint(arrays):
            self._outbox.put(lambda: self._sender.send(response(arrays, self._requested)))

    def event(self, event: Event) -> None:
        """An event, in the output ``event``."""
        self.send({"event": bytes_array(encode_event(event))})

    def pulsing(self, pulse: Pulse, taken: Callable[[], bool]) -> Callable[[], bool]:
        """``cancelled`` for a step of an ensemble: a call sends ``pulse``, which is no answer, if it is ``taken``."""
        self._pulse = {"pulse": message_array(pulse)}

        def send() -> None:
            if not self._ended:
                self._sender.send(response(self._pulse))

        def gone() -> bool:
            if taken():
                self._outbox.put(send)
            return self.cancelled()

        return gone

    def finish(self, arrays: Arrays | None = None) -> None:
        """The last response, with or without outputs."""
        self._end(lambda: () if arrays is None else (response({**arrays, **self._pulse}, self._requested),))

    def fail(self, error: BaseException) -> None:
        """An error as the last response; to an ensemble whose client has gone, none."""
        if not isinstance(error, BagelError):
            log.error("a request failed", exc_info=error)
        if self.in_ensemble and isinstance(error, Cancelled):
            self.finish()
            return
        self._end(lambda: (error_response(error),))

    def _end(self, last: Callable[[], tuple[Any, ...]]) -> None:
        def send() -> None:
            with self._ending:
                self._ended = True
                self._sender.send(*last(), flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

        self._outbox.put(send)

    def settle(self, done: Future[tuple[Result, StageStats]], outputs: Callable[[Result], Arrays]) -> None:
        """Answer with what becomes of an engine's job."""

        def with_stats(done: tuple[Result, StageStats]) -> Arrays:
            result, stats = done
            return {**outputs(result), "stats": bytes_array(encode_stats(stats))}

        self.answer(done, with_stats)

    def answer(self, done: Future[Result], outputs: Callable[[Result], Arrays]) -> None:
        """Answer with ``outputs`` of what ``done`` resolves to, or with its error."""

        def finish(future: Future[Result]) -> None:
            try:
                self.finish(outputs(future.result()))
            except Exception as error:
                self.fail(error)

        done.add_done_callback(finish)
