"""A fake Triton, controlled by a test, behind a real gRPC port."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import msgspec
from tritonclient.grpc import service_pb2, service_pb2_grpc

from bagel_triton.deploy.topology import MODELS
from bagel_triton.protocol.messages import encode
from bagel_triton.protocol.sleep import SleepState, State, decode_sleep_call
from bagel_triton.triton.tickets import Adapt, StageStatus, TicketAnswer, decode_call


class TritonService(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    """``ready`` are the models that are, ``unloaded`` those that were; ``answers`` the self-test's, text or a
    refusal, by model."""

    def __init__(self) -> None:
        self.ready: set[str] = set()
        self.unloaded: set[str] = set()
        self.answers: dict[str, str | ValueError] = {}
        self.answers_after_s = 0.0
        self.draining, self.work_of_others = False, 0  # what a stage reports of itself
        self.adapters: dict[str, str] = {}  # paths by name; a call to load one is carried out at once
        self.states: list[State] = ["awake"]  # of the server, the last one for ever
        self.calls: list[str] = []  # of sleep's actions
        self.asked: list[tuple[str, str]] = []

    def ModelReady(self, request: Any, context: Any) -> Any:
        """Whether the test said so."""
        return service_pb2.ModelReadyResponse(ready=request.name in self.ready)

    def RepositoryIndex(self, request: Any, context: Any) -> Any:
        """Every model of ours; Triton gives a state only to those that it was told to load."""
        states = dict.fromkeys(self.unloaded, "UNAVAILABLE") | dict.fromkeys(self.ready, "READY")
        index = service_pb2.RepositoryIndexResponse()
        for model in MODELS:
            index.models.add(name=model, state=states.get(model, ""))
        return index

    def _status(self, request: Any) -> Any:
        called = decode_call(request.raw_input_contents[0][4:])
        if isinstance(called.call, Adapt):
            self.adapters[called.call.name] = called.call.path
        status = StageStatus(self.draining, 0, self.work_of_others, adapters=tuple(self.adapters))
        answer = encode(TicketAnswer(called.token, status=status))
        response = service_pb2.ModelInferResponse(model_name=request.model_name)
        response.outputs.add(name="ticket", datatype="BYTES", shape=[1])
        response.raw_output_contents.append(len(answer).to_bytes(4, "little") + answer)
        return response

    def ModelStreamInfer(self, requests: Any, context: Any) -> Iterator[Any]:
        """The orchestrator's answer to a call of sleep's: the next of ``states``."""
        for request in requests:
            assert [tensor.name for tensor in request.inputs] == ["sleep"]
            self.calls.append(decode_sleep_call(request.raw_input_contents[0][4:]).action)
            state = self.states[0] if len(self.states) == 1 else self.states.pop(0)
            answer = msgspec.json.encode(SleepState(state, 0, "wait" if state == "awake" else "refuse"))
            response = service_pb2.ModelInferResponse(model_name=request.model_name)
            response.outputs.add(name="event", datatype="BYTES", shape=[1])
            response.raw_output_contents.append(len(answer).to_bytes(4, "little") + answer)
            yield service_pb2.ModelStreamInferResponse(infer_response=response)

    def ModelInfer(self, request: Any, context: Any) -> Any:
        """The model's answer; one without outputs where the test has none."""
        if [tensor.name for tensor in request.inputs] == ["ticket"]:
            return self._status(request)
        self.asked.append((request.model_name, request.raw_input_contents[0][4:].decode()))
        time.sleep(self.answers_after_s)
        answer = self.answers.get(request.model_name)
        response = service_pb2.ModelInferResponse(model_name=request.model_name)
        if isinstance(answer, ValueError):
            context.abort(grpc.StatusCode.UNAVAILABLE, str(answer))
        elif answer is not None:
            response.outputs.add(name="selftest", datatype="BYTES", shape=[1])
            response.raw_output_contents.append(len(answer).to_bytes(4, "little") + answer.encode())
        return response


@contextlib.contextmanager
def serving(service: TritonService, address: str = "127.0.0.1:0") -> Iterator[str]:
    """The address at which ``service`` is reached."""
    server = grpc.server(ThreadPoolExecutor(4))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(service, server)
    port = server.add_insecure_port(address)
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None).wait()
