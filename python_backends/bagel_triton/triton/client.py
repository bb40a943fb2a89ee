"""Triton over gRPC, for what is on another host: one channel for each address."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import grpc
import numpy as np
from tritonclient.grpc import InferResult, service_pb2, service_pb2_grpc
from tritonclient.utils import np_to_triton_dtype, serialize_byte_tensor

from bagel_triton.protocol.errors import BagelError, Internal, StageUnavailable, from_text
from bagel_triton.protocol.tensors import Array, Arrays

# Triton is on this host or network: a restarted one is found within a second, and
# http_proxy of the environment is not for it.
CHANNEL_ARGS = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.enable_http_proxy", 0),
]
CALL_S = 10.0  # every call of a stage is answered at once or, a poll, after a fraction of a second
READY_POLL_S, READY_S = 0.25, 3.0
_UNREACHABLE = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.DEADLINE_EXCEEDED)


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
            BagelError: what the model answered instead.
        """
        request = service_pb2.ModelInferRequest(model_name=model, id=request_id)
        for name, array in arrays.items():
            request.inputs.add(name=name, datatype=np_to_triton_dtype(array.dtype), shape=array.shape)
            request.raw_input_contents.append(_raw(array))
        for name in outputs:
            request.outputs.add(name=name)
        metadata = tuple((headers or {}).items())
        result = InferResult(self._call("ModelInfer", request, timeout_s, metadata))
        return {output.name: result.as_numpy(output.name) for output in result.get_response().outputs}

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
                self._channel = grpc.insecure_channel(self._address, options=CHANNEL_ARGS)
            channel = self._channel
        try:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            return getattr(stub, method)(request, timeout=timeout_s, metadata=metadata)
        except grpc.RpcError as error:
            typed = from_text(f"{self._address}: {error.details()}")
            if not isinstance(typed, Internal) or error.code() not in _UNREACHABLE:
                raise typed from error
            self._replace(channel)
            reason = f"{error.code().name}: {error.details()}"
            raise StageUnavailable(f"Triton at {self._address} cannot be reached: {reason}") from error
        except ValueError as error:  # another thread has just closed the channel
            raise StageUnavailable(f"{self._address}: {error}") from error

    def _replace(self, failed: grpc.Channel | None) -> None:
        with self._lock:
            if failed is not None and self._channel is not failed:
                return
            channel, self._channel = self._channel, None
        if channel is not None:
            channel.close()


class RemoteModels:
    """Models on other hosts, by the gRPC address of the server of each.

    A process lock cannot be seen from another host, so the readiness of each model is checked a
    few times a second. That host's watchdog unloads a model whose process
    died, so a death shows as well.
    """

    def __init__(self, addresses: Mapping[str, str]) -> None:
        self.addresses = addresses
        self._servers = {address: TritonServer(address) for address in set(addresses.values())}
        # When the last check began that found the model missing.
        self._missed_at = dict.fromkeys(addresses, -math.inf)
        self._missing: dict[str, list[str]] = {address: [] for address in self._servers}
        self._closing = threading.Event()
        for address in self._servers:
            threading.Thread(target=self._check, args=(address,), name="remote-readiness", daemon=True).start()

    def watch(self, model: str) -> Callable[[], bool]:
        """Whether ``model`` has been ready since this call, when called."""
        began = time.monotonic()
        return lambda: self._missed_at[model] < began

    def is_ready(self, model: str) -> bool:
        """Whether the last check found ``model`` ready."""
        return model not in self._missing[self.addresses[model]]

    def model_call(self, model: str) -> Callable[..., Arrays]:
        """Calls ``model``; see :class:`ModelCall`."""
        server = self._servers[self.addresses[model]]

        def call(
            arrays: Arrays, outputs: Sequence[str], request_id: str, headers: Mapping[str, str] | None = None
        ) -> Arrays:
            return server.infer(model, arrays, outputs, request_id, headers=headers)

        return call

    def close(self) -> None:
        """Stop checking, and close the channels."""
        self._closing.set()
        for server in self._servers.values():
            server.close()

    def _check(self, address: str) -> None:
        server = self._servers[address]
        models = [model for model, other in self.addresses.items() if other == address]
        while not self._closing.is_set():
            began = time.monotonic()
            missing = [model for model in models if not server.is_ready(model)]
            self._missed_at.update(dict.fromkeys(missing, began))
            self._missing[address] = missing
            self._closing.wait(READY_POLL_S)


def _raw(array: Array) -> bytes:
    if array.dtype != np.object_:
        return array.tobytes()
    serialized = serialize_byte_tensor(array)
    return bytes(serialized.item()) if serialized.size else b""
