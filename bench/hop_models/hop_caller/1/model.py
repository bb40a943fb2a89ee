"""Makes hops to a worker, in one of three ways, and answers with how long each took."""

import threading
import time
from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
from tritonclient.grpc import service_pb2, service_pb2_grpc

from bagel_triton.ipc.liveness import Announcement
from bagel_triton.pipeline.pipeline import StageCall
from bagel_triton.protocol.tensors import Array
from bagel_triton.triton import io as triton_io
from bagel_triton.triton.client import CHANNEL_OPTIONS, TritonServer
from bagel_triton.triton.stages import Doorbell, TicketClient

WORKER, STREAM = "hop_worker", "hop_stream"
Hop = Callable[[Array], Array]


def by_tickets(client: TicketClient) -> Hop:
    """A hop by tickets, over the client's own transport."""

    def hop(x: Array) -> Array:
        call: StageCall[Array] = StageCall("dit")
        client.submit(call, {"x": x}, ["y"], lambda arrays: arrays["y"], "hop")
        following = call.follow(lambda: False, 60.0)
        try:
            while True:
                next(following)
        except StopIteration as stop:
            y: Array = stop.value[0]
            return y

    return hop


def by_stream(address: str) -> Hop:
    """A hop by a gRPC stream of its own, as stages were called before tickets."""

    def hop(x: Array) -> Array:
        request = service_pb2.ModelInferRequest(model_name=STREAM, id="hop")
        request.parameters["triton_enable_empty_final_response"].bool_param = True
        request.inputs.add(name="x", datatype="FP32", shape=x.shape)
        request.raw_input_contents.append(x.tobytes())
        for name in ("event", "y"):
            request.outputs.add(name=name)
        y = None
        with grpc.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
            stream = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelStreamInfer(iter([request]))
            for answer in stream:
                response = answer.infer_response
                if [output.name for output in response.outputs] == ["y"]:
                    y = np.frombuffer(response.raw_output_contents[0], np.float32)
                if response.parameters["triton_final_response"].bool_param:
                    break
            stream.cancel()
        assert y is not None
        return y

    return hop


class TritonPythonModel:
    """``way``, ``at_once``, ``elements``, ``seconds`` -> ``latencies`` [hops] in seconds."""

    def initialize(self, args: dict[str, str]) -> None:
        self._outbox = triton_io.Outbox()
        self._announcement = Announcement("bench_hop", "hop_caller")

    def execute(self, requests: list[Any]) -> list[None]:
        for request in requests:
            inputs = triton_io.arrays_of(request)
            reply = triton_io.Reply(request, self._outbox)
            threading.Thread(target=self._measure, args=(inputs, reply), daemon=True).start()
        return [None] * len(requests)

    def _measure(self, inputs: dict[str, Array], reply: triton_io.Reply) -> None:
        try:
            reply.finish({"latencies": np.array(self._hops(inputs))})
        except Exception as error:
            reply.fail(error)

    def _hops(self, inputs: dict[str, Array]) -> list[float]:
        way, address = triton_io.text_of(inputs, "way"), triton_io.text_of(inputs, "grpc")
        server = TritonServer(address)
        client = None
        if way == "BLS tickets":
            client = TicketClient(triton_io.model_call(WORKER), Doorbell("bench_hop"), self._announcement.lock_name)
        elif way == "grpc tickets":
            client = TicketClient(server.model_call(WORKER))
        hop = by_stream(address) if client is None else by_tickets(client)
        x = np.arange(inputs["elements"].item(), dtype=np.float32)
        latencies: list[float] = []
        failures: list[Exception] = []
        end = time.monotonic() + inputs["seconds"].item()

        def run() -> None:
            try:
                while (started := time.monotonic()) < end:
                    y = hop(x)
                    latencies.append(time.monotonic() - started)
                    assert len(y) == len(x)
                    assert y[-1] == x[-1]
            except Exception as error:
                failures.append(error)

        threads = [threading.Thread(target=run) for _ in range(inputs["at_once"].item())]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if client is not None:
            client.close(1.0)
        server.close()
        if failures:
            raise failures[0]
        return latencies

    def finalize(self) -> None:
        self._announcement.withdraw()
        self._outbox.close()
