"""The real gRPC client against a Triton service in this process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from proxy_fake import DONE, IMAGE, ONE_ANSWER, PIXELS, PROGRESS, user_turn
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import deserialize_bytes_tensor, triton_to_np_dtype

from bagel_triton.openai.settings import ProxySettings
from bagel_triton.protocol.adapters import AdapterCall
from bagel_triton.protocol.errors import BagelError, Internal, InvalidRequest, StageUnavailable
from bagel_triton.protocol.events import encode_event
from bagel_triton.protocol.request import GenerationRequest
from bagel_triton.protocol.sleep import SleepCall
from bagel_triton.protocol.tensors import from_tensors
from bagel_triton.triton.client import StageResponse, TritonClient
from tests.support.stage_process import PREFIX, AnnouncedProcess, announced_in

Script = list[Any]
HANG = "hang"


def wire(response: StageResponse) -> service_pb2.ModelStreamInferResponse:
    """``response`` as Triton sends it."""
    message = service_pb2.ModelInferResponse(model_name="bagel")
    event = encode_event(response.event)
    message.outputs.add(name="event", datatype="BYTES", shape=[1])
    message.raw_output_contents.append(len(event).to_bytes(4, "little") + event)
    if response.image is not None:
        message.outputs.add(name="generated_image", datatype="UINT8", shape=response.image.shape)
        message.raw_output_contents.append(response.image.tobytes())
    return service_pb2.ModelStreamInferResponse(infer_response=message)


def refusal(text: str) -> service_pb2.ModelStreamInferResponse:
    return service_pb2.ModelStreamInferResponse(error_message=text)


class Service(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    """Answers by ``script``; at :data:`HANG` not before the request is aborted, if it ``aborts`` at all."""

    def __init__(self, script: Script, aborts: bool = True) -> None:
        self.script, self.aborts = script, aborts
        self.requests: list[Any] = []
        self.cancelled, self.ended = asyncio.Event(), asyncio.Event()
        self.aborted: dict[bytes, asyncio.Event] = {}

    async def ModelStreamInfer(self, requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        [request] = [request async for request in requests]
        if [tensor.name for tensor in request.inputs] == ["abort"]:
            if self.aborts:
                self.aborted[request.raw_input_contents[0]].set()
            yield wire(PROGRESS[0])
            return
        self.requests.append(request)
        aborted = asyncio.Event()
        for tensor, raw in zip(request.inputs, request.raw_input_contents, strict=True):
            if tensor.name == "abort":
                self.aborted[raw] = aborted
        try:
            for item in self.script:
                if item == HANG:
                    await aborted.wait()
                    yield refusal("Cancelled(): the client left")
                    self.ended.set()
                    return
                if isinstance(item, grpc.StatusCode):
                    await context.abort(item, "gone")
                yield item
        except asyncio.CancelledError:
            self.cancelled.set()
            raise


def play(service: Service, work: Callable[[TritonClient], Awaitable[Any]], **settings: Any) -> Any:
    """What ``work`` makes of a client that is connected to ``service``."""

    async def session() -> Any:
        server = grpc.aio.server(options=[("grpc.max_send_message_length", -1)])
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(service, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        client = TritonClient(ProxySettings(f"127.0.0.1:{port}", ("bagel",), **settings))
        try:
            return await work(client)
        finally:
            await client.close()
            await server.stop(None)

    return asyncio.run(asyncio.wait_for(session(), 60))


async def everything(client: TritonClient, request: GenerationRequest | None = None) -> list[StageResponse]:
    return [response async for response in client.generate(request or GenerationRequest("A cat"), "r-1", {})]


def failure(script: Script, **settings: Any) -> BagelError:
    with pytest.raises(BagelError) as caught:
        play(Service(script), everything, **settings)
    return caught.value


def test_events_and_the_image_arrive_typed_and_in_order() -> None:
    responses = play(Service([wire(item) for item in (*PROGRESS, IMAGE, DONE)]), everything)
    assert [response.event for response in responses] == [item.event for item in (*PROGRESS, IMAGE, DONE)]
    np.testing.assert_array_equal(responses[3].image, PIXELS)


def test_an_image_larger_than_grpcs_own_limit_arrives() -> None:
    pixels = np.zeros((1500, 1500, 3), dtype=np.uint8)
    event = type(IMAGE.event)(0, 1500, 1500, 7)  # type: ignore[call-arg]
    responses = play(Service([wire(StageResponse(event, pixels)), wire(DONE)]), everything)
    assert responses[0].image.nbytes == 6_750_000


def test_the_request_arrives_whole_and_only_what_was_given() -> None:
    service = Service([wire(item) for item in ONE_ANSWER])
    request = GenerationRequest(
        messages=(user_turn("What is on it?", 1, 0),),
        image=(b"\x89PNG\x00\xff", b""),
        modality="text",
        seed=2**40,
        temperature=0.1,
        stop=("a", "\u00e9"),
        think=True,
    )
    responses = play(service, lambda client: everything(client, request))
    assert [response.event for response in responses] == [item.event for item in ONE_ANSWER]
    [sent] = service.requests
    assert (sent.model_name, sent.id) == ("bagel", "r-1")
    assert received(sent) == request


def received(sent: Any) -> GenerationRequest:
    """The request in a gRPC message, as Triton hands it to a model."""
    arrays = {}
    for tensor, raw in zip(sent.inputs, sent.raw_input_contents, strict=True):
        if tensor.datatype == "BYTES":
            array = deserialize_bytes_tensor(raw)
        else:
            array = np.frombuffer(raw, triton_to_np_dtype(tensor.datatype))
        arrays[tensor.name] = array.reshape(tensor.shape)
    del arrays["abort"]
    return from_tensors(arrays)


def test_an_integer_no_tensor_can_hold_is_refused_before_it_is_sent() -> None:
    service = Service([])
    with pytest.raises(InvalidRequest, match="height=4294967296 is not allowed"):
        play(service, lambda client: everything(client, GenerationRequest("A cat", height=2**32)))
    assert not service.requests


def test_a_stages_error_arrives_as_what_it_was() -> None:
    error = failure([wire(PROGRESS[0]), refusal("in ensemble 'x', InvalidRequest(height): height=7 is not allowed")])
    assert isinstance(error, InvalidRequest)
    assert (error.param, error.message) == ("height", "height=7 is not allowed")


@pytest.mark.parametrize(
    ("script", "kind", "text"),
    [
        (
            [refusal("Request for unknown model: 'bagel' is not found")],
            StageUnavailable,
            "bagel is unavailable: it is being loaded",
        ),
        ([refusal("Stub process 'bagel_0_0' is not healthy.")], StageUnavailable, "not healthy"),
        ([refusal("something else")], Internal, "something else"),
        ([refusal("Server not ready")], StageUnavailable, "Server not ready"),
        ([refusal("Cancelled(): the client cancelled the request")], StageUnavailable, "bagel is being stopped"),
        ([grpc.StatusCode.UNAVAILABLE], StageUnavailable, "cannot be reached: UNAVAILABLE: gone"),
        ([grpc.StatusCode.CANCELLED], StageUnavailable, "cannot be reached: CANCELLED: gone"),
        ([grpc.StatusCode.INTERNAL], Internal, "gone"),
        ([wire(IMAGE)], Internal, "without its last event"),
        ([], Internal, "without its last event"),
        ([wire(StageResponse(IMAGE.event))], Internal, "should be uint8 [32, 48, 3] but is nothing"),
        ([wire(StageResponse(IMAGE.event, PIXELS[:16]))], Internal, "but is uint8 [16, 48, 3]"),
    ],
)
def test_what_goes_wrong_has_its_kind(script: Script, kind: type[BagelError], text: str) -> None:
    error = failure(script)
    assert type(error) is kind
    assert text in error.message


def test_a_silent_server_is_given_up() -> None:
    error = failure([wire(PROGRESS[0]), HANG], silence_timeout_s=0.2)
    assert isinstance(error, StageUnavailable)
    assert error.message == "bagel was silent for 0.2 s"


def test_nothing_at_the_address_is_unavailable() -> None:
    async def session() -> None:
        client = TritonClient(ProxySettings("127.0.0.1:1", ("bagel",)))
        with pytest.raises(StageUnavailable, match=r"Triton at 127\.0\.0\.1:1 cannot be reached"):
            await everything(client)
        with pytest.raises(StageUnavailable, match=r"Triton at 127\.0\.0\.1:1 cannot be reached"):
            await client.readiness()
        await client.close()

    asyncio.run(session())


def test_a_consumer_that_stops_aborts_its_request_and_no_stream_is_cancelled() -> None:
    service = Service([wire(PROGRESS[0]), HANG])

    async def leave(client: TritonClient) -> None:
        other = asyncio.create_task(everything(client))
        while not service.requests:
            await asyncio.sleep(0.01)
        responses = client.generate(GenerationRequest("A cat"), "r-1", {})
        await anext(responses)
        await responses.aclose()
        await asyncio.wait_for(service.ended.wait(), 10)
        assert [aborted.is_set() for aborted in service.aborted.values()] == [False, True]
        assert not service.cancelled.is_set()
        assert not other.done()
        other.cancel()
        with pytest.raises(asyncio.CancelledError):
            await other

    play(service, leave)


def test_a_consumer_that_is_cancelled_aborts_its_request() -> None:
    service = Service([wire(PROGRESS[0]), HANG])

    async def cancel(client: TritonClient) -> None:
        consumer = asyncio.create_task(everything(client))
        while not service.requests:
            await asyncio.sleep(0.01)
        consumer.cancel()
        with pytest.raises(asyncio.CancelledError):
            await consumer
        await asyncio.wait_for(service.ended.wait(), 10)
        assert not service.cancelled.is_set()

    play(service, cancel)


def test_a_request_that_no_abort_ends_is_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bagel_triton.triton.client.LEAVE_S", 0.2)
    service = Service([wire(PROGRESS[0]), HANG], aborts=False)

    async def leave(client: TritonClient) -> None:
        responses = client.generate(GenerationRequest("A cat"), "r-1", {})
        await anext(responses)
        await responses.aclose()
        await asyncio.wait_for(service.cancelled.wait(), 10)

    play(service, leave)


@pytest.fixture
def shm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where processes announce themselves to the client under test."""
    return announced_in(tmp_path, monkeypatch)


def test_an_orchestrator_that_dies_is_not_waited_for(shm: Path) -> None:
    service = Service([wire(PROGRESS[0]), HANG])

    async def die(client: TritonClient) -> None:
        responses = client.generate(GenerationRequest("A cat"), "r-1", {})
        assert (await anext(responses)).event == PROGRESS[0].event
        orchestrator.kill()
        with pytest.raises(StageUnavailable, match=r"^bagel died$"):
            await asyncio.wait_for(anext(responses), 5)

    with AnnouncedProcess(shm, "bagel") as orchestrator:
        play(service, die, shm_prefix=PREFIX)


@pytest.mark.parametrize(
    "call",
    [
        lambda client: client.sleep(SleepCall("sleep")),
        lambda client: client.adapters(AdapterCall("load", "style", "style")),
    ],
)
def test_one_that_dies_during_a_change_of_the_server_is_not_waited_for(
    shm: Path, call: Callable[[TritonClient], Awaitable[Any]]
) -> None:
    service = Service([HANG])

    async def die(client: TritonClient) -> None:
        change = asyncio.ensure_future(call(client))
        while not service.requests:
            await asyncio.sleep(0.01)
        orchestrator.kill()
        with pytest.raises(StageUnavailable, match=r"^bagel died$"):
            await asyncio.wait_for(change, 5)

    with AnnouncedProcess(shm, "bagel") as orchestrator:
        play(service, die, shm_prefix=PREFIX)


def test_a_silent_orchestrator_that_lives_is_waited_for(shm: Path) -> None:
    with AnnouncedProcess(shm, "bagel"):
        error = failure([wire(PROGRESS[0]), HANG], silence_timeout_s=1.5, shm_prefix=PREFIX)
    assert error.message == "bagel was silent for 1.5 s"
