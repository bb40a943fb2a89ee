"""The client of Triton's gRPC: all calls, their options, and the mapping of their failures.

:class:`TritonClient` is the proxy's, on an event loop; :class:`TritonServer` makes the same calls from threads.
"""

from __future__ import annotations

import asyncio
import io
import math
import secrets
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import grpc
import msgspec
import numpy as np
from numpy.typing import NDArray
from tritonclient.grpc import InferResult, service_pb2, service_pb2_grpc
from tritonclient.utils import np_to_triton_dtype

from bagel_triton.deploy.topology import DIT, MODELS, ORCHESTRATOR
from bagel_triton.ipc import liveness
from bagel_triton.ipc.sleep_gate import SleepGate
from bagel_triton.protocol.adapters import AdapterCall, AdapterNames
from bagel_triton.protocol.errors import BagelError, Cancelled, Internal, StageUnavailable, from_text
from bagel_triton.protocol.events import DoneEvent, Event, ImageEvent, PartialImageEvent, decode_event
from bagel_triton.protocol.intervals import WATCH_S
from bagel_triton.protocol.request import ABORT, GenerationRequest
from bagel_triton.protocol.sleep import SleepCall, SleepState
from bagel_triton.protocol.tensors import Arrays, to_tensors
from bagel_triton.triton.tickets import Status, exchange

# Triton is on this host or network: a restarted one is found within a second, and
# http_proxy of the environment is not for it. The proxy and the models limit sizes themselves.
CHANNEL_OPTIONS = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.enable_http_proxy", 0),
]
LEAVE_S, LAST_S = 10.0, 1.0  # that an aborted request may take to end before its stream is cancelled; at the very end
ABORT_EVERY_S = 1.0  # an abort may overtake a large request
CALL_S = 10.0  # every call of a stage is answered at once or, a poll, after a fraction of a second
READY_S = 3.0
LARGE_REQUEST = 2**20  # bytes of images
COPIED_AT_ONCE = 2**18
# The tag of a length-delimited field of ModelInferRequest, one for each input in their order.
RAW_INPUT_CONTENTS = bytes((service_pb2.ModelInferRequest.RAW_INPUT_CONTENTS_FIELD_NUMBER << 3 | 2,))
_STREAM_METHOD = "/inference.GRPCInferenceService/ModelStreamInfer"
_UNREACHABLE = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.DEADLINE_EXCEEDED)


def rpc_failure(address: str, error: grpc.RpcError) -> tuple[BagelError, bool]:
    """The typed error of a failed call of the Triton at ``address``, and whether Triton was reached."""
    answered = from_text(error.details())
    if error.code() not in _UNREACHABLE or not isinstance(answered, Internal):
        return answered, True
    reason = f"{error.code().name}: {error.details()}"
    return StageUnavailable(f"Triton at {address} cannot be reached: {reason}"), False


@dataclass(frozen=True)
class StageResponse:
    """One response of ``bagel``; ``image`` [H, W, 3] comes with an image or a partial image."""

    event: Event
    image: NDArray[np.uint8] | None = None


@dataclass(frozen=True)
class Readiness:
    """Whether each model is ready, and the state of each server of stage 1 by its address: ready, draining, down.

    ``asleep`` is the state of a server that sleeps or drains.
    """

    models: dict[str, bool]
    replicas: dict[str, str] = field(default_factory=dict)
    asleep: SleepState | None = None


class ClientSettings(Protocol):
    """The client's part of the proxy's settings: Triton's address and the models that must be ready."""

    @property
    def triton_grpc(self) -> str: ...
    @property
    def silence_timeout_s(self) -> float: ...
    @property
    def ready_timeout_s(self) -> float: ...
    @property
    def models(self) -> tuple[str, ...] | None: ...
    @property
    def shm_prefix(self) -> str | None: ...
    @property
    def remote(self) -> tuple[str, ...]: ...
    @property
    def remote_addresses(self) -> Callable[[], Sequence[str]]: ...


class Client(Protocol):
    """The calls of Triton that the proxy makes."""

    def generate(
        self, request: GenerationRequest, request_id: str, headers: Mapping[str, str]
    ) -> AsyncGenerator[StageResponse, None]:
        """Responses as they come, a ``DoneEvent`` last; closing it cancels the request.

        ``headers`` go with it.

        Raises:
            BagelError: a stage's error, or Triton is gone.
        """

    async def readiness(self) -> Readiness:
        """The readiness of each model.

        Raises:
            StageUnavailable: Triton cannot be reached.
        """

    async def sleep(self, call: SleepCall) -> SleepState:
        """Change the server's state, or find it out.

        Raises:
            BagelError: it could not be changed, or Triton is gone.
        """

    async def adapters(self, call: AdapterCall) -> AdapterNames:
        """Load or unload an adapter, or find out which there are; errors likewise."""

    async def close(self) -> None:
        """Give the connection back."""


class TritonClient:
    """:class:`Client` over gRPC. Connects on first use, in the event loop that uses it."""

    def __init__(self, settings: ClientSettings) -> None:
        self._settings = settings
        self._channel: grpc.aio.Channel | None = None
        self._leaving: set[asyncio.Task[None]] = set()

    def _connected(self) -> grpc.aio.Channel:
        if self._channel is None:
            self._channel = grpc.aio.insecure_channel(self._settings.triton_grpc, options=CHANNEL_OPTIONS)
        return self._channel

    async def generate(
        self, request: GenerationRequest, request_id: str, headers: Mapping[str, str]
    ) -> AsyncGenerator[StageResponse, None]:
        # Written in a thread: each copy of a large image would hold up every other request.
        large = sum(map(len, request.image or ())) > LARGE_REQUEST
        token = secrets.token_hex(8)
        written = partial(_written, request, request_id, token)
        message = await asyncio.to_thread(written) if large else written()
        responses = self._stream(message, headers)
        del message
        alive = self._watch()
        last: Event | None = None
        try:
            # The request side is closed after one request, so Triton ends the stream
            # when it has seen the final flag.
            while (response := await self._next(responses, alive)) is not None:
                last = response.event
                yield response
        except Exception:  # the last response, or Triton is gone
            responses.cancel()
            raise
        except BaseException:
            self._leave(token, responses)
            raise
        if not isinstance(last, DoneEvent):
            raise Internal(f"{ORCHESTRATOR} ended the stream of {request_id} without its last event")

    def _stream(self, message: bytes, headers: Mapping[str, str] | None = None) -> _Stream:
        stream = self._connected().stream_stream(
            _STREAM_METHOD, response_deserializer=service_pb2.ModelStreamInferResponse.FromString
        )
        return _Stream(stream(_once(message), metadata=tuple((headers or {}).items())))

    def _leave(self, token: str, responses: _Stream) -> None:
        """Abort the request of ``token`` and let its stream end.

        To cancel the stream would do the same, but Triton's gRPC server may deadlock where a stream is
        cancelled while a response goes out: see :class:`~bagel_triton.triton.io.Outbox`.
        """

        async def leave() -> None:
            try:
                async with asyncio.timeout(LEAVE_S):
                    await self._state(ABORT, token.encode())
                    while not await responses.ends(ABORT_EVERY_S):
                        await self._state(ABORT, token.encode())
            except (BagelError, grpc.RpcError, TimeoutError):
                pass
            finally:
                responses.cancel()

        task = asyncio.create_task(leave())
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)

    def _watch(self) -> Callable[[], bool]:
        prefix = self._settings.shm_prefix
        return (lambda: True) if prefix is None else liveness.watch(prefix, ORCHESTRATOR)

    async def _next(self, responses: _Stream, alive: Callable[[], bool]) -> StageResponse | None:
        """The next response; ``None`` at the end of the stream."""
        timeout_s = self._settings.silence_timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                answer = await self._while_alive(responses, alive)
        except TimeoutError as timeout:
            raise StageUnavailable(f"{ORCHESTRATOR} was silent for {timeout_s:g} s") from timeout
        if answer is None:
            return None
        if answer.error_message:
            typed = from_text(answer.error_message)
            if isinstance(typed, Cancelled):  # not by this client, which would not be listening
                raise StageUnavailable(f"{ORCHESTRATOR} is being stopped")
            raise typed
        return _decode(InferResult(answer.infer_response))

    async def _while_alive(self, responses: _Stream, alive: Callable[[], bool]) -> Any | None:
        """The next message, while :data:`ORCHESTRATOR` lives; ``None`` at the end of the stream."""
        lived = True
        while not await responses.has_next(WATCH_S):
            # Twice, so that responses sent before its death are still read.
            if not (lived or alive()):
                raise StageUnavailable(f"{ORCHESTRATOR} died")
            lived = alive()
        try:
            return await responses.read()
        except grpc.RpcError as broken:
            raise rpc_failure(self._settings.triton_grpc, broken)[0] from broken

    async def readiness(self) -> Readiness:
        channel, remote, prefix = self._connected(), self._settings.remote, self._settings.shm_prefix
        addresses = self._settings.remote_addresses() if remote else ()
        try:
            models = await self._loaded_models(channel) if self._settings.models is None else self._settings.models
            states, replicas = await asyncio.gather(
                asyncio.gather(*(self._is_ready(channel, model) for model in models)),
                asyncio.gather(*(self._replica(address) for address in addresses)),
            )
        except grpc.RpcError as error:
            raise rpc_failure(self._settings.triton_grpc, error)[0] from error
        dead = () if prefix is None else liveness.dead_stages(prefix)
        here = {model: ready and model not in dead for model, ready in zip(models, states, strict=True)}
        elsewhere = {model: any(ready[model] for ready, _ in replicas) for model in remote}
        if all(elsewhere.values()):  # requests go to servers that have every model, and do not drain
            elsewhere = dict.fromkeys(remote, any(state == "ready" for _, state in replicas))
        asleep = await self._asleep() if here.get(ORCHESTRATOR) else None
        states_of = dict(zip(addresses, (state for _, state in replicas), strict=True))
        return Readiness(here | elsewhere, states_of, asleep)

    async def _asleep(self) -> SleepState | None:
        """The state of the server where it sleeps or drains, which a file says where its processes run on this host."""
        prefix = self._settings.shm_prefix
        if prefix is not None and not ((gate := SleepGate(prefix)).level or gate.draining):
            return None
        try:
            async with asyncio.timeout(self._settings.ready_timeout_s):
                found = await self.sleep(SleepCall("state"))
        except TimeoutError as error:
            raise StageUnavailable(f"{ORCHESTRATOR} does not answer") from error
        except Internal as error:
            raise StageUnavailable(f"{ORCHESTRATOR}: {error.message}") from error
        return None if found.state == "awake" else found

    async def sleep(self, call: SleepCall) -> SleepState:
        return msgspec.json.decode(await self._state("sleep", msgspec.json.encode(call)), type=SleepState)

    async def adapters(self, call: AdapterCall) -> AdapterNames:
        return msgspec.json.decode(await self._state("adapters", msgspec.json.encode(call)), type=AdapterNames)

    async def _state(self, name: str, call: bytes) -> bytes:
        """The state that :data:`ORCHESTRATOR` answers with to the input ``name`` alone."""
        message, contents = _message(ORCHESTRATOR, "", {name: np.array([call], dtype=np.object_)})
        message.raw_input_contents.extend(b"".join(pieces) for pieces in contents)
        responses = self._stream(message.SerializeToString())
        try:
            answer = await self._while_alive(responses, self._watch())
        finally:
            responses.cancel()
        if answer is None:
            raise StageUnavailable(f"{ORCHESTRATOR} ended before it answered")
        if answer.error_message:
            raise from_text(answer.error_message)
        events = InferResult(answer.infer_response).as_numpy("event")
        if events is None or events.size != 1:
            raise Internal(f"a response of {ORCHESTRATOR} carries no state")
        return bytes(events.reshape(-1)[0])

    async def _loaded_models(self, channel: grpc.aio.Channel) -> tuple[str, ...]:
        """Our models that this Triton loads, and :data:`ORCHESTRATOR` in any case.

        They differ with the topology, and with the stage where each has a server of its own.
        """
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        index = await stub.RepositoryIndex(service_pb2.RepositoryIndexRequest(), timeout=self._settings.ready_timeout_s)
        loaded = {ORCHESTRATOR} | {model.name for model in index.models if model.state}
        return tuple(model for model in MODELS if model in loaded)

    async def _is_ready(self, channel: grpc.aio.Channel, model: str) -> bool:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        request = service_pb2.ModelReadyRequest(name=model)
        return bool((await stub.ModelReady(request, timeout=self._settings.ready_timeout_s)).ready)

    async def _replica(self, address: str) -> tuple[dict[str, bool], str]:
        """The remote models that a server has, and its state."""
        # By a connection of its own: an old one to a host that has gone and come back may stay silent.
        async with grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:

            async def is_ready(model: str) -> bool:
                try:
                    return await self._is_ready(channel, model)
                except grpc.RpcError:
                    return False

            ready = {model: await is_ready(model) for model in self._settings.remote}
        if not all(ready.values()):
            return ready, "down"
        drains = await asyncio.to_thread(_drains, address, self._settings.ready_timeout_s)
        return ready, "draining" if drains else "ready"

    async def close(self) -> None:
        if self._leaving:
            _, late = await asyncio.wait(self._leaving, timeout=LAST_S)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
        if self._channel is not None:
            await self._channel.close()
            self._channel = None


class TritonServer:
    """The Triton at ``address``, over one channel that every thread shares.

    A channel that failed is replaced: to a host that went away and came back an old connection
    can stay silent for many minutes.
    """

    def __init__(self, address: str) -> None:
        self._address = address
        self._lock = threading.Lock()
        self._channel: grpc.Channel | None = None

    def infer(
        self,
        model: str,
        arrays: Arrays,
        outputs: Sequence[str],
        request_id: str,
        timeout_s: float = CALL_S,
        headers: Mapping[str, str] | None = None,
    ) -> Arrays:
        """One unary inference; ``headers`` become its metadata.

        Raises:
            BagelError: the model's error, or Triton is gone.
        """
        message, contents = _message(model, request_id, arrays)
        message.raw_input_contents.extend(b"".join(pieces) for pieces in contents)
        for name in outputs:
            message.outputs.add(name=name)
        metadata = tuple((headers or {}).items())
        result = InferResult(self._call("ModelInfer", message, timeout_s, metadata))
        return {output.name: result.as_numpy(output.name) for output in result.get_response().outputs}

    def model_call(self, model: str, timeout_s: float = CALL_S) -> Callable[..., Arrays]:
        """Calls ``model``; see :class:`ModelCall`."""

        def call(
            arrays: Arrays, outputs: Sequence[str], request_id: str, headers: Mapping[str, str] | None = None
        ) -> Arrays:
            return self.infer(model, arrays, outputs, request_id, timeout_s, headers)

        return call

    def is_ready(self, model: str, timeout_s: float = READY_S) -> bool:
        """Whether ``model`` is ready; False also where the server cannot be reached."""
        try:
            return bool(self._call("ModelReady", service_pb2.ModelReadyRequest(name=model), timeout_s).ready)
        except BagelError:
            return False

    def close(self) -> None:
        """Close the channel, which ends the calls on it."""
        self._replace(None)

    def _call(self, method: str, request: Any, timeout_s: float, metadata: Sequence[tuple[str, str]] = ()) -> Any:
        with self._lock:
            if self._channel is None:
                self._channel = grpc.insecure_channel(self._address, options=CHANNEL_OPTIONS)
            channel = self._channel
        try:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            return getattr(stub, method)(request, timeout=timeout_s, metadata=metadata)
        except grpc.RpcError as error:
            failure, reached = rpc_failure(self._address, error)
            if not reached:
                self._replace(channel)
            raise failure from error
        except ValueError as error:  # another thread has just closed the channel
            raise StageUnavailable(f"{self._address}: {error}") from error

    def _replace(self, failed: grpc.Channel | None) -> None:
        with self._lock:
            if failed is not None and self._channel is not failed:
                return
            channel, self._channel = self._channel, None
        if channel is not None:
            channel.close()


class RemoteServer:
    """The Triton of another host, at ``address``, and the readiness of its ``models``.

    A process lock cannot be seen from another host, so the readiness of each model is checked a
    few times a second. That host's watchdog unloads a model whose process
    died, so a death shows as well. ``checked`` is called after each check, on the thread that made it.
    """

    def __init__(self, address: str, models: Sequence[str], checked: Callable[[], None] = lambda: None) -> None:
        self.address, self._models, self._checked = address, tuple(models), checked
        self._server = TritonServer(address)
        # When the last check began that found the model missing.
        self._missed_at = dict.fromkeys(models, -math.inf)
        self._missing: list[str] = []
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._check, name="remote-readiness", daemon=True)

    def start(self) -> None:
        """Begin to check."""
        self._thread.start()

    def watch(self, model: str) -> Callable[[], bool]:
        """Whether ``model`` has been ready since this call, when called."""
        began = time.monotonic()
        return lambda: self._missed_at[model] < began

    def is_ready(self, model: str) -> bool:
        """Whether the last check found ``model`` ready."""
        return model not in self._missing

    @property
    def ready(self) -> bool:
        """Whether the last check found every model ready."""
        return not self._missing

    def model_call(self, model: str, timeout_s: float = CALL_S) -> Callable[..., Arrays]:
        """Calls ``model``; see :class:`ModelCall`."""
        return self._server.model_call(model, timeout_s)

    def close(self) -> None:
        """Stop checking, and close the channel."""
        self._closing.set()
        self._server.close()

    def _check(self) -> None:
        while not self._closing.is_set():
            began = time.monotonic()
            missing = [model for model in self._models if not self._server.is_ready(model)]
            self._missed_at.update(dict.fromkeys(missing, began))
            self._missing = missing
            self._checked()
            self._closing.wait(WATCH_S)


def _drains(address: str, timeout_s: float) -> bool:
    """Whether the DiT at ``address`` drains; False where it is too busy to answer."""
    server = TritonServer(address)
    try:
        answer, _ = exchange(server.model_call(DIT, timeout_s), Status())
        return answer.status is not None and answer.status.draining
    except BagelError:
        return False
    finally:
        server.close()


class _Stream:
    """The messages of one call. A message that is waited for in vain is not lost: gRPC would cancel the call."""

    def __init__(self, responses: Any) -> None:
        self._responses = responses
        self._reading: asyncio.Task[Any | None] | None = None

    async def has_next(self, timeout_s: float) -> bool:
        """Whether :meth:`read` would return at once, after at most ``timeout_s``."""
        self._reading = self._reading or asyncio.create_task(self._read())
        return bool((await asyncio.wait({self._reading}, timeout=timeout_s))[0])

    async def read(self) -> Any | None:
        """The next message; ``None`` at the end of the stream."""
        while not await self.has_next(WATCH_S):
            pass
        reading, self._reading = self._reading, None
        assert reading is not None, "it has just been waited for"
        return reading.result()

    async def ends(self, timeout_s: float) -> bool:
        """Skip messages for at most ``timeout_s``; whether they have come to the end."""
        try:
            async with asyncio.timeout(timeout_s):
                while await self.read() is not None:
                    pass
        except TimeoutError:
            return False
        return True

    def cancel(self) -> None:
        """End the call, unless it has ended."""
        if self._reading is not None:
            self._reading.cancel()
        self._responses.cancel()

    async def _read(self) -> Any | None:
        try:
            return await anext(aiter(self._responses))
        except StopAsyncIteration:
            return None


def _message(model: str, request_id: str, arrays: Arrays) -> tuple[Any, list[list[bytes]]]:
    """Triton's protobuf message without its inputs' contents, and those contents, each in pieces."""
    message = service_pb2.ModelInferRequest(model_name=model, id=request_id)
    contents: list[list[bytes]] = []
    for name, array in arrays.items():
        message.inputs.add(name=name, datatype=np_to_triton_dtype(array.dtype), shape=array.shape)
        if array.dtype == np.object_:
            items: list[bytes] = array.reshape(-1).tolist()
            contents.append([piece for item in items for piece in (len(item).to_bytes(4, "little"), item)])
        else:
            contents.append([array.tobytes()])
    return message, contents


def _written(request: GenerationRequest, request_id: str, token: str) -> bytes:
    """``request`` as the bytes of Triton's protobuf message; it can be aborted by ``token``.

    The tensors' contents are written by hand, in pieces: protobuf would copy a large image
    several times, and hold the interpreter's lock for each copy.

    Raises:
        InvalidRequest: a value fits no tensor.
    """
    arrays = to_tensors(request) | {ABORT: np.array([token.encode()], dtype=np.object_)}
    message, contents = _message(ORCHESTRATOR, request_id, arrays)
    written = io.BytesIO()
    written.write(message.SerializeToString())
    for pieces in contents:
        written.write(RAW_INPUT_CONTENTS + _varint(sum(map(len, pieces))))
        for piece in pieces:
            for start in range(0, len(piece), COPIED_AT_ONCE):
                written.write(memoryview(piece)[start : start + COPIED_AT_ONCE])
                let_others_run()
    return written.getvalue()


def let_others_run() -> None:
    """Release the interpreter's lock: a thread that waits for it would get it only after 5 ms."""
    time.sleep(0)


def _varint(number: int) -> bytes:
    """``number`` as protobuf writes a length: seven bits a byte, the lowest first."""
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)


async def _once(message: bytes) -> AsyncIterator[bytes]:
    yield message


def _decode(result: InferResult) -> StageResponse | None:
    """The typed response in ``result``; sizes are checked, as Triton may lose an output."""
    events = result.as_numpy("event")
    if events is None or events.size != 1:
        raise Internal(f"a response of {ORCHESTRATOR} carries no event")
    try:
        event = decode_event(events.reshape(-1)[0])
    except msgspec.DecodeError as error:
        raise Internal(f"a response of {ORCHESTRATOR} carries an event that cannot be read: {error}") from error
    if not isinstance(event, ImageEvent | PartialImageEvent):
        return StageResponse(event)
    image = result.as_numpy("generated_image")
    shape = (event.height, event.width, 3)
    if image is None or image.shape != shape or image.dtype != np.uint8:
        found = "nothing" if image is None else f"{image.dtype} {list(image.shape)}"
        raise Internal(f"generated_image should be uint8 {list(shape)} but is {found}")
    return StageResponse(event, image)
