"""Triton's objects as typed values and back: the only module that knows ``pb_utils``."""

from __future__ import annotations

import itertools
import json
import logging
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

import numpy as np
import triton_python_backend_utils as pb_utils

from bagel_triton.ipc.liveness import LAST_WORDS_S
from bagel_triton.protocol.errors import BagelError, InvalidRequest, from_exception, from_text
from bagel_triton.protocol.events import StageStats, encode_stats
from bagel_triton.protocol.intervals import WATCH_S
from bagel_triton.protocol.messages import Message, decode, encode
from bagel_triton.protocol.request import REQUEST_FIELDS
from bagel_triton.protocol.tensors import Array, Arrays
from bagel_triton.telemetry import tracing

M = TypeVar("M", bound=Message)
# Parameters that the protocol itself knows; every other one was meant as an input.
TRITON_PARAMETERS = ("id", "priority", "timeout", "sequence_id", "sequence_start", "sequence_end")
Result = TypeVar("Result")
SEND_S, SEND_CHECKS = 60.0, 12  # that a send may take, and how often it is checked in that time
_CHECKING = threading.Lock()
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
    """The request's parameters; they include the headers that Triton forwards."""
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


def token_of(request: Any, name: str) -> bytes | None:
    """What is in the BYTES [1] input ``name``; None without it. No other input is read."""
    found = [tensor.as_numpy().reshape(-1)[0] for tensor in request.inputs() if tensor.name() == name]
    return bytes(found[0]) if found else None


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


def mapped(done: Future[Result], function: Callable[[Result], Arrays]) -> Future[Arrays]:
    """``function`` of what ``done`` resolves to, or its error."""
    arrays: Future[Arrays] = Future()

    def resolve(done: Future[Result]) -> None:
        try:
            arrays.set_result(function(done.result()))
        except Exception as error:
            arrays.set_exception(error)

    done.add_done_callback(resolve)
    return arrays


def model_call(model: str) -> Callable[..., Arrays]:
    """Calls ``model`` of this server by BLS, from any thread; see :class:`ModelCall`.

    Only unary calls: those of a decoupled model corrupt memory or deadlock (docs/architecture.md).
    """

    def call(
        arrays: Arrays, outputs: Sequence[str], request_id: str, headers: Mapping[str, str] | None = None
    ) -> Arrays:
        answer = pb_utils.InferenceRequest(
            model_name=model,
            request_id=request_id,
            inputs=[pb_utils.Tensor(name, array) for name, array in arrays.items()],
            requested_output_names=list(outputs),
        ).exec()
        if answer.has_error():
            raise from_text(answer.error().message())
        # Copied: the tensors lie in memory that Triton takes back with the answer.
        return {tensor.name(): tensor.as_numpy().copy() for tensor in answer.output_tensors()}

    return call


def _triton_ender() -> Callable[[], None]:
    """A function that ends the tritonserver of this process, and this process."""
    triton = os.getppid()

    def end() -> None:
        try:
            # Not by Triton, which may take no log record any more. ``serve`` gives the line as its reason.
            print(f"error: a response was not sent within {SEND_S:g} s: Triton hangs", file=sys.stderr, flush=True)
            if os.getppid() == triton:  # not a process that adopted this one
                os.kill(triton, signal.SIGABRT)
                time.sleep(LAST_WORDS_S)
        finally:
            os._exit(1)

    return end


class Outbox:
    """Sends responses from a thread of its own, so that no engine waits for a client.

    Triton queues a response and waits for no client. A send that does not return has met a deadlock
    in Triton's gRPC server: a response of a decoupled model locks its stream and then its request, a
    cancellation the request and then the stream (``StreamInferResponseComplete`` and ``Process`` in
    24.10, and still in 26.08). All streams share the thread that takes cancellations, so none works
    any more, not even to a reloaded model. So ``stuck`` is called, which by default ends tritonserver.
    """

    def __init__(self, stuck: Callable[[], None] | None = None) -> None:
        self._sends: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._sending = 0  # the number of the send under way; 0 between two
        self._stuck, self._closed = stuck or _triton_ender(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="outbox", daemon=True)
        self._thread.start()
        threading.Thread(target=self._watch, name="outbox_watch", daemon=True).start()

    def put(self, send: Callable[[], None]) -> None:
        """Queue one send."""
        self._sends.put(send)

    def close(self) -> None:
        """Send all queued responses, then stop."""
        self._sends.put(None)
        self._thread.join()
        self._closed.set()

    def _run(self) -> None:
        for number in itertools.count(1):
            if (send := self._sends.get()) is None:
                return
            self._sending = number
            try:
                send()
            except Exception:  # one client's stream is broken; the other responses still have to go out
                log.warning("a response could not be sent", exc_info=True)
            self._sending = 0

    def _watch(self) -> None:
        """Find a send that does not return. Checks are counted: a paused container's clock goes on."""
        watched, checks = 0, 0
        while not self._closed.wait(SEND_S / SEND_CHECKS):
            sending = self._sending
            checks = checks + 1 if sending and sending == watched else 0
            watched = sending
            if checks == SEND_CHECKS:
                self._stuck()
                return


class Reply:
    """The answer to one request, sent after ``execute`` has returned.

    A decoupled model sends any number of responses, then :meth:`finish` or :meth:`fail`;
    every other model only the last of these, exactly once.
    """

    def __init__(self, request: Any, outbox: Outbox) -> None:
        self.request_id: str = request.request_id()
        self._requested: frozenset[str] = frozenset(request.requested_output_names())
        self._sender = request.get_response_sender()
        self._outbox = outbox
        self._cancelled, self._checked_at = False, time.monotonic()
        self._aborted = False
        self._ended, self._ending = False, threading.Lock()

    def abort(self) -> None:
        """Take the request for cancelled from now on."""
        self._aborted = True

    def cancelled(self) -> bool:
        """Whether the client has aborted the request, or cancelled it as of at most ``WATCH_S`` ago.

        The check is a round trip to another process, over the queue that also carries responses.
        So one thread at a time makes it, seldom, and none after the last response, when Triton
        has forgotten the request.
        """
        if self._aborted:
            return True
        now = time.monotonic()
        if not self._cancelled and now - self._checked_at >= WATCH_S:
            self._checked_at = now
            with self._ending, _CHECKING:
                self._cancelled = not self._ended and bool(self._sender.is_cancelled())
        return self._cancelled

    def send(self, arrays: Arrays) -> None:
        """One response of several."""
        if not self._requested or not self._requested.isdisjoint(arrays):
            self._outbox.put(lambda: self._sender.send(response(arrays, self._requested)))

    def end(self) -> None:
        """End a stream of responses."""
        self._end(lambda: ())

    def finish(self, arrays: Arrays) -> None:
        """The last response, or the only one."""
        self._end(lambda: (response(arrays, self._requested),))

    def fail(self, error: BaseException) -> None:
        """An error as the last response."""
        if not isinstance(error, BagelError):
            log.error("a request failed", exc_info=error)
        self._end(lambda: (error_response(error),))

    def settle(self, done: Future[tuple[Result, StageStats]], outputs: Callable[[Result], Arrays]) -> None:
        """Answer with the ``outputs`` of an engine's job and its times, or with its error."""

        def with_stats(done: tuple[Result, StageStats]) -> Arrays:
            result, stats = done
            return {**outputs(result), "stats": bytes_array(encode_stats(stats))}

        self.answer(mapped(done, with_stats))

    def answer(self, arrays: Future[Arrays]) -> None:
        """Answer with ``arrays`` when they are there, or with their error."""

        def finish(done: Future[Arrays]) -> None:
            if (error := done.exception()) is None:
                self.finish(done.result())
            else:
                self.fail(error)

        arrays.add_done_callback(finish)

    def _end(self, last: Callable[[], tuple[Any, ...]]) -> None:
        def send() -> None:
            with self._ending:
                self._ended = True
                self._sender.send(*last(), flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

        self._outbox.put(send)
