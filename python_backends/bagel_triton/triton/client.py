"""One call of a Triton model over a gRPC stream of its own."""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import grpc
import numpy as np
import tritonclient.grpc as triton
from tritonclient.grpc import InferResult, service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException, np_to_triton_dtype, serialize_byte_tensor

from bagel_triton.protocol.errors import BagelError, StageUnavailable, from_text
from bagel_triton.protocol.tensors import Array, Arrays

GRPC_VARIABLE, DEFAULT_GRPC = "BAGEL_TRITON_GRPC", "127.0.0.1:8001"
DROP_S = 2.0  # a cancellation takes milliseconds, unless its stage dies meanwhile
log = logging.getLogger(__name__)
_GONE = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)  # nobody cancels but who stops listening


def own_address() -> str:
    """Where this server's own gRPC is."""
    return os.environ.get(GRPC_VARIABLE, DEFAULT_GRPC)


def drop(address: str, stage: str, request_id: str) -> None:
    """Tell ``stage`` at ``address`` to drop a request; one that cannot be told is logged."""
    inputs = {"cancel": np.array([request_id.encode()], dtype=np.object_)}
    try:
        for _ in call(address, stage, inputs, [], request_id, DROP_S):
            pass
    except BagelError as error:
        log.warning("%s could not be told to drop request %s: %s", stage, request_id, error.message)


def call(
    address: str, model: str, arrays: Arrays, outputs: Sequence[str], request_id: str, timeout_s: float | None = None
) -> Iterator[Arrays]:
    """Responses of ``model`` at ``address``, as arrays by name; closing the iterator cancels the request.

    Not by tritonclient's own streams: stopped with a cancellation, one leaves a thread and
    its request behind (2.51).

    Raises:
        BagelError: what the model answered instead.
    """
    with grpc.insecure_channel(address, options=CHANNEL_ARGS) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        stream = stub.ModelStreamInfer(iter([_request(model, arrays, outputs, request_id)]), timeout=timeout_s)
        try:
            for answer in stream:
                if answer.error_message:
                    raise from_text(answer.error_message)
                response = answer.infer_response
                if response.outputs:
                    result = InferResult(response)
                    yield {output.name: result.as_numpy(output.name) for output in response.outputs}
                if response.parameters["triton_final_response"].bool_param:
                    return
            raise StageUnavailable(f"{address}: {model} ended the stream before its answer")
        except grpc.RpcError as error:
            raise _typed(error, address) from error
        finally:
            stream.cancel()


def _request(model: str, arrays: Arrays, outputs: Sequence[str], request_id: str) -> service_pb2.ModelInferRequest:
    request = service_pb2.ModelInferRequest(model_name=model, id=request_id)
    request.parameters["triton_enable_empty_final_response"].bool_param = True
    for name, array in arrays.items():
        request.inputs.add(name=name, datatype=np_to_triton_dtype(array.dtype), shape=array.shape)
        request.raw_input_contents.append(_raw(array))
    for name in outputs:
        request.outputs.add(name=name)
    return request


def _raw(array: Array) -> bytes:
    if array.dtype != np.object_:
        return array.tobytes()
    serialized = serialize_byte_tensor(array)
    return bytes(serialized.item()) if serialized.size else b""


def _typed(error: grpc.RpcError, address: str) -> BagelError:
    text = f"{address}: {error.details()}"
    if error.code() in _GONE:
        return StageUnavailable(text)
    return from_text(text)


# Triton is on this host or network: a restarted one is found within a second, and
# http_proxy of the environment is not for it.
CHANNEL_ARGS = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.enable_http_proxy", 0),
]
POLL_S, ANSWER_S = 0.25, 3.0


class RemoteModels:
    """Watches models by the gRPC ``addresses`` of their servers."""

    def __init__(self, addresses: Mapping[str, str]) -> None:
        self.addresses = addresses
        # When the last question began that had no good answer.
        self._missed_at = dict.fromkeys(addresses, -math.inf)
        self._closing = threading.Event()
        for address in set(addresses.values()):
            threading.Thread(target=self._ask, args=(address,), daemon=True).start()

    def watch(self, model: str) -> Callable[[], bool]:
        """Whether ``model`` has been there since this call, when called."""
        began = time.monotonic()
        return lambda: self._missed_at[model] < began

    def close(self) -> None:
        """Ask no more."""
        self._closing.set()

    def _ask(self, address: str) -> None:
        while not self._closing.is_set():
            # A connection that failed once is not trusted again.
            with triton.InferenceServerClient(address, channel_args=CHANNEL_ARGS) as client:
                while self._all_ready(client, address) and not self._closing.wait(POLL_S):
                    pass
            self._closing.wait(POLL_S)

    def _all_ready(self, client: triton.InferenceServerClient, address: str) -> bool:
        models = [model for model, other in self.addresses.items() if other == address]
        began = time.monotonic()
        try:
            missing = [model for model in models if not client.is_model_ready(model, client_timeout=ANSWER_S)]
        except InferenceServerException:  # out of reach, with all that it has
            missing = models
        self._missed_at.update(dict.fromkeys(missing, began))
        return not missing
