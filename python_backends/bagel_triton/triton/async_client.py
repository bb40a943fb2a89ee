"""The one connection to Triton: a gRPC stream per request to the decoupled model ``bagel``."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import grpc
import msgspec
import numpy as np
from numpy.typing import NDArray
from tritonclient.grpc import InferResult, service_pb2
from tritonclient.grpc.aio import InferenceServerClient
from tritonclient.utils import InferenceServerException

from bagel_triton.deploy.topology import MODELS, ORCHESTRATOR
from bagel_triton.ipc import liveness
from bagel_triton.protocol.errors import BagelError, Cancelled, Internal, StageUnavailable, from_text
from bagel_triton.protocol.events import DoneEvent, Event, ImageEvent, PartialImageEvent, decode_event
from bagel_triton.protocol.request import REQUEST_FIELDS, GenerationRequest
from bagel_triton.protocol.tensors import to_tensors
from bagel_triton.triton.client import CHANNEL_ARGS

STREAM_METHOD = "/inference.GRPCInferenceService/ModelStreamInfer"
LARGE_REQUEST = 2**20  # bytes of images
COPIED_AT_ONCE = 2**20
# The tag of a length-delimited field of ModelInferRequest, one for each input in their order.
RAW_INPUT_CONTENTS = bytes((service_pb2.ModelInferRequest.RAW_INPUT_CONTENTS_FIELD_NUMBER << 3 | 2,))
LIVENESS_S = 0.25  # between two checks of a silent orchestrator's life
_GONE = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.DEADLINE_EXCEEDED)


@dataclass(frozen=True)
class StageResponse:
    """One response of ``bagel``; ``image`` [H, W, 3] comes with an image or a partial image."""

    event: Event
    image: NDArray[np.uint8] | None = None


class ClientSettings(Protocol):
    """Where Triton is and which of its models must be ready: the part of the proxy's settings that the client reads."""

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
    def remote(self) -> Mapping[str, str]: ...


class Client(Protocol):
    """The calls of Triton that the proxy makes."""

    def generate(
        self, request: GenerationRequest, request_id: str, headers: Mapping[str, str]
    ) -> AsyncGenerator[StageResponse, None]:
        """Responses as they come, a ``DoneEvent`` last; closing it cancels the request.

        ``headers`` go with it.

        Raises:
            BagelError: whatever a stage raised, or Triton is gone.
        """

    async def readiness(self) -> dict[str, bool]:
        """Whether each model is ready.

        Raises:
            StageUnavailable: Triton cannot be reached.
        """

    async def close(self) -> None:
        """Give the connection back."""


class TritonClient:
    """:class:`Client` over gRPC. Connects on first use, in the event loop that uses it."""

    def __init__(self, settings: ClientSettings) -> None:
        self._settings = settings
        self._connection: InferenceServerClient | None = None
        self._channel: grpc.aio.Channel | None = None

    @property
    def _triton(self) -> InferenceServerClient:
        if self._connection is None:
            self._connection = InferenceServerClient(self._settings.triton_grpc, channel_args=CHANNEL_ARGS)
        return self._connection

    async def generate(
        self, request: GenerationRequest, request_id: str, headers: Mapping[str, str]
    ) -> AsyncGenerator[StageResponse, None]:
        # Written in a thread: each copy of a large image would hold up every other request.
        large = sum(map(len, request.image or ())) > LARGE_REQUEST
        message = await asyncio.to_thread(_message, request, request_id) if large else _message(request, request_id)
        responses = self._stream(_once(message), metadata=tuple(headers.items()))
        del message
        alive = self._watch()
        last: Event | None = None
        try:
            # The request side is closed after one request, so Triton ends the stream
            # when it has seen the final flag.
            while (response := await self._next(responses, alive)) is not None:
                last = response.event
                yield response
        finally:
            responses.cancel()
        if not isinstance(last, DoneEvent):
            raise Internal(f"{ORCHESTRATOR} ended the stream of {request_id} without its last event")

    def _stream(self, messages: AsyncIterator[bytes], metadata: tuple[tuple[str, str], ...]) -> Any:
        if self._channel is None:
            self._channel = grpc.aio.insecure_channel(self._settings.triton_grpc, options=CHANNEL_ARGS)
        method = self._channel.stream_stream(
            STREAM_METHOD, response_deserializer=service_pb2.ModelStreamInferResponse.FromString
        )
        return method(messages, metadata=metadata)

    def _watch(self) -> Callable[[], bool]:
        prefix = self._settings.shm_prefix
        return (lambda: True) if prefix is None else liveness.watch(prefix, ORCHESTRATOR)

    async def _next(self, responses: Any, alive: Callable[[], bool]) -> StageResponse | None:
        """The next response; ``None`` at the end of the stream."""
        timeout_s = self._settings.silence_timeout_s
        reading = asyncio.create_task(_read(responses))
        try:
            async with asyncio.timeout(timeout_s):
                lived = True
                while not (await asyncio.wait({reading}, timeout=LIVENESS_S))[0]:
                    # Twice, so that what was sent before its death is still read.
                    if not (lived or alive()):
                        raise StageUnavailable(f"{ORCHESTRATOR} died")
                    lived = alive()
            if (answer := reading.result()) is None:
                return None
        except TimeoutError as timeout:
            raise StageUnavailable(f"{ORCHESTRATOR} was silent for {timeout_s:g} s") from timeout
        except grpc.RpcError as broken:
            raise self._from_rpc(broken.code(), broken.details()) from broken
        finally:
            reading.cancel()
        if answer.error_message:
            typed = from_text(answer.error_message)
            if isinstance(typed, Cancelled):  # not by this client, which would not be listening
                raise StageUnavailable(f"{ORCHESTRATOR} is being stopped")
            raise typed
        return _decode(InferResult(answer.infer_response))

    async def readiness(self) -> dict[str, bool]:
        timeout_s, remote = self._settings.ready_timeout_s, self._settings.remote
        try:
            models = await self._loaded_models() if self._settings.models is None else self._settings.models
            *states, elsewhere = await asyncio.gather(
                *(self._triton.is_model_ready(model, client_timeout=timeout_s) for model in models),
                asyncio.gather(*(self._is_ready_at(address, model) for model, address in remote.items())),
            )
        except InferenceServerException as error:
            raise StageUnavailable(self._unreachable(error.message())) from error
        dead = () if self._settings.shm_prefix is None else liveness.dead_stages(self._settings.shm_prefix)
        here = {model: ready and model not in dead for model, ready in zip(models, states, strict=True)}
        return here | dict(zip(remote, elsewhere, strict=True))

    async def _loaded_models(self) -> tuple[str, ...]:
        """Our models that this Triton loads, and :data:`ORCHESTRATOR` in any case.

        They differ with the topology, and with the stage where each has a server of its own.
        """
        index = await self._triton.get_model_repository_index(client_timeout=self._settings.ready_timeout_s)
        loaded = {ORCHESTRATOR} | {model.name for model in index.models if model.state}
        return tuple(model for model in MODELS if model in loaded)

    async def _is_ready_at(self, address: str, model: str) -> bool:
        # By a connection of its own: an old one to a host that has gone and come back may stay silent.
        async with InferenceServerClient(address, channel_args=CHANNEL_ARGS) as client:
            try:
                return bool(await client.is_model_ready(model, client_timeout=self._settings.ready_timeout_s))
            except InferenceServerException:
                return False

    async def close(self) -> None:
        if self._channel is not None:
            await self._channel.close()
            self._channel = None
        if self._connection is not None:
            await self._connection.close()
            self._connection = None

    def _from_rpc(self, code: grpc.StatusCode, details: str) -> BagelError:
        return StageUnavailable(self._unreachable(details)) if code in _GONE else from_text(details)

    def _unreachable(self, details: str) -> str:
        return f"Triton at {self._settings.triton_grpc} cannot be reached: {details}"


async def _read(responses: Any) -> Any | None:
    """The next message; ``None`` at the end of the stream."""
    try:
        return await anext(aiter(responses))
    except StopAsyncIteration:
        return None


def _message(request: GenerationRequest, request_id: str) -> bytes:
    """``request`` as Triton's protobuf message.

    The tensors' contents are written by hand, in pieces: protobuf would copy a large image
    several times, and hold the interpreter's lock for each copy.

    Raises:
        InvalidRequest: a value fits no tensor.
    """
    message = service_pb2.ModelInferRequest(model_name=ORCHESTRATOR, id=request_id)
    contents: list[list[bytes]] = []
    for name, array in to_tensors(request).items():
        message.inputs.add(name=name, datatype=REQUEST_FIELDS[name].datatype, shape=array.shape)
        if array.dtype == np.object_:
            items: list[bytes] = array.reshape(-1).tolist()
            contents.append([piece for item in items for piece in (len(item).to_bytes(4, "little"), item)])
        else:
            contents.append([array.tobytes()])
    written = io.BytesIO()
    written.write(message.SerializeToString())
    for pieces in contents:
        written.write(RAW_INPUT_CONTENTS + _varint(sum(map(len, pieces))))
        for piece in pieces:
            for start in range(0, len(piece), COPIED_AT_ONCE):
                written.write(memoryview(piece)[start : start + COPIED_AT_ONCE])
    return written.getvalue()


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
