"""One call of a Triton model over a gRPC stream of its own."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence

import grpc
import numpy as np
from tritonclient.grpc import InferResult, service_pb2, service_pb2_grpc
from tritonclient.utils import np_to_triton_dtype, serialize_byte_tensor

from bagel_triton.errors import BagelError, StageUnavailable, from_text
from bagel_triton.remote import CHANNEL_ARGS
from bagel_triton.request import Array, Arrays

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
