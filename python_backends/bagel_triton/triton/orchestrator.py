"""The models that follow a request through the stages: ``bagel`` and ``bagel_infer``."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from bagel_triton.deploy.config import DeployConfig, from_environment
from bagel_triton.deploy.topology import DECODER, ORCHESTRATOR
from bagel_triton.ipc import control_file
from bagel_triton.ipc.adapters import AdapterTable
from bagel_triton.ipc.liveness import Announcement, end_when
from bagel_triton.ipc.sleep_gate import SleepGate
from bagel_triton.pipeline.pipeline import GeneratedImage, Item, PartialImage, Pipeline
from bagel_triton.protocol.adapters import decode_adapter_call
from bagel_triton.protocol.errors import Cancelled, Overloaded, StageUnavailable, from_exception
from bagel_triton.protocol.events import ProgressEvent, TextEvent, encode_event
from bagel_triton.protocol.intervals import REQUEST_S
from bagel_triton.protocol.messages import Message
from bagel_triton.protocol.request import ABORT, REQUEST_FIELDS
from bagel_triton.protocol.sleep import decode_sleep_call
from bagel_triton.protocol.tensors import Arrays, from_tensors
from bagel_triton.telemetry import tracing
from bagel_triton.telemetry.metrics import METRIC_DEFS, SUPERVISOR, Metrics, NoMetrics
from bagel_triton.telemetry.tracing import Span
from bagel_triton.triton import io as triton_io
from bagel_triton.triton.adapters import AdapterStage, RemoteAdapters, ServerAdapters
from bagel_triton.triton.metrics import TritonMetrics
from bagel_triton.triton.sleep import ServerSleep, Sleeper, StageSleeper
from bagel_triton.triton.stages import StageConnections, TritonStages

if TYPE_CHECKING:
    from bagel_triton.triton.replicas import Replicas

LAST_S = 0.5  # for requests that are being ended
STREAM = "stream"  # input of ``bagel``: false for a single response
SLEEP = "sleep"  # input of ``bagel``: a change of the server's state, see :mod:`bagel_triton.protocol.sleep`
ADAPTERS = "adapters"  # likewise: a change of its adapters, see :mod:`bagel_triton.protocol.adapters`


class InFlight:
    """At most ``limit`` at a time: each is ``with`` this, from any thread.

    Raises:
        Overloaded: there are as many already.
    """

    def __init__(self, limit: int, metrics: Metrics) -> None:
        self._limit, self._metrics = limit, metrics
        self._count, self._changed = 0, threading.Condition()

    def __enter__(self) -> None:
        with self._changed:
            if self._count >= self._limit:
                raise Overloaded(f"{self._limit} requests are in flight already")
            self._add(1)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._add(-1)

    def drain(self, seconds: float) -> None:
        """Wait until none is left, but no longer than ``seconds``."""
        with self._changed:
            self._changed.wait_for(lambda: not self._count, seconds)

    def _add(self, difference: int) -> None:
        self._count += difference
        self._metrics.gauge("requests_active", self._count)
        self._changed.notify_all()


class Orchestrator:
    """Chains the stages, which are other models, or engines in this process where the topology has but one.

    A thread follows each request: that is waiting for a stage, a client that may leave and a
    deadline, which a thread does plainly. ``max_inflight`` bounds the threads.

    With ``streams``, a decoupled model: a response for every event, unless the request's
    ``stream`` is false. Otherwise, and then, all events and images come in one response.
    """

    streams = True

    def initialize(self, args: dict[str, str]) -> None:
        """Connect to the stages; nothing is loaded here, unless everything is."""
        triton_io.use_triton_log()
        self._outbox, config = triton_io.Outbox(), from_environment()
        one_process = config.topology.one_process
        own = tuple(METRIC_DEFS) if one_process else [args["model_name"], SUPERVISOR]
        # Two models cannot share a metric of Triton's; of a unary one, Triton's own count whole requests.
        self._metrics = TritonMetrics(own) if self.streams else None
        gate = SleepGate(config.shm_prefix)
        self._config, self._local, self._gate = config.bagel, None, gate
        self._max_model_len = config.thinker.max_model_len
        if one_process:
            from bagel_triton.engine.build import StageResources  # otherwise this process needs no torch
            from bagel_triton.engine.sleep import SleepingEngine
            from bagel_triton.pipeline.local import LocalStages

            def build(resources: StageResources) -> LocalStages:
                return LocalStages(config, self._metrics, resources=resources)

            local = SleepingEngine(lambda: StageResources.open(config), build, gate.level)
            self._local = local
            end_when(lambda: local.is_lost)
        self._tracing = tracing.from_environment()
        self._closing = threading.Event()
        self._in_flight = InFlight(config.bagel.max_inflight, self._metrics or NoMetrics())
        self._state_calls = InFlight(config.bagel.max_inflight, NoMetrics())
        self._abortable: dict[bytes, triton_io.Reply] = {}  # by their tokens
        self._announcement = Announcement(config.shm_prefix, args["model_name"])
        self._table = AdapterTable(config.shm_prefix, ORCHESTRATOR, config.lora_modules)
        replicas = self._replicas(config)
        connect = partial(StageConnections, config.models, triton_io.model_call, self._announcement, config.shm_prefix)
        self._connections = None if one_process else connect(replicas)
        set_addresses = None if replicas is None else replicas.set_addresses
        self._sleep = ServerSleep(gate, config.bagel.while_asleep, self._sleepers, self._metrics or NoMetrics())
        defaults = {values.get("lora", "") for values in config.request_defaults.values()}
        self._adapters = ServerAdapters(self._table, gate, self._adapter_stages, defaults)
        counters = self._metrics or _NoCounters()
        control_file.start_watching(config.shm_prefix, counters, self._closing, set_addresses)

    def _replicas(self, config: DeployConfig) -> Replicas | None:
        if not config.remote_models:
            return None
        from bagel_triton.triton.replicas import Replicas  # gRPC, which one host does not need

        metrics = self._metrics or NoMetrics()
        servers = config.remote_models, config.remote_addresses
        return Replicas(*servers, config.bagel.lb_policy, metrics, lambda: self._table.added, config.lora_modules)

    def _sleepers(self) -> dict[str, Sleeper]:
        """Every stage, wherever it is."""
        if self._local is not None:
            return {"bagel": self._local}
        assert self._connections is not None, "the stages are elsewhere"
        return {name: StageSleeper(call) for name, call in self._connections.stage_calls().items()}

    def _adapter_stages(self, reachable: bool) -> dict[str, AdapterStage]:
        """Every stage that computes with adapters, likewise; or those of servers that are ``reachable``."""
        if self._local is not None:
            return {"bagel": self._local}
        assert self._connections is not None, "the stages are elsewhere"
        calls = self._connections.stage_calls(reachable)
        return {name: RemoteAdapters(call) for name, call in calls.items() if not name.startswith(DECODER)}

    def execute(self, requests: list[Any]) -> list[None] | None:
        """Follow every request from a thread of its own."""
        for request in requests:
            reply, token = triton_io.Reply(request, self._outbox), triton_io.token_of(request, ABORT)
            if token is not None and len(request.inputs()) == 1:
                self._abort(token)
                reply.finish({"event": triton_io.bytes_array(b"{}")})
                continue
            if token is not None:  # here, so that no abort comes before it
                self._abortable[token] = reply
            threading.Thread(target=self._follow, args=(request, reply, token), daemon=True).start()
        return None if self.streams else [None] * len(requests)

    def _abort(self, token: bytes) -> None:
        if (reply := self._abortable.get(token)) is not None:
            reply.abort()

    def _follow(self, request: Any, reply: triton_io.Reply, token: bytes | None) -> None:
        try:
            if {SLEEP, ADAPTERS}.isdisjoint(tensor.name() for tensor in request.inputs()):
                self._follow_request(request, reply)
            else:
                self._follow_state_call(request, reply)
        finally:
            if token is not None and self._abortable.get(token) is reply:
                del self._abortable[token]

    def _follow_state_call(self, request: Any, reply: triton_io.Reply) -> None:
        """Find out the server's state, or change it; metrics count requests to generate alone."""
        try:
            with self._state_calls:
                triton_io.refuse_parameters(request, REQUEST_FIELDS)
                state = self._state(triton_io.arrays_of(request), lambda: self._gone(reply))
            reply.finish({"event": triton_io.bytes_array(msgspec.json.encode(state))})
        except Exception as caught:
            reply.fail(self._unless_stopping(caught))

    def _state(self, inputs: Arrays, gone: Callable[[], bool]) -> Message:
        if SLEEP in inputs:
            return self._sleep.answer(decode_sleep_call(bytes(inputs[SLEEP].reshape(-1)[0])), gone)
        found = self._adapters.answer(decode_adapter_call(bytes(inputs[ADAPTERS].reshape(-1)[0])), gone)
        return msgspec.structs.replace(found, max_model_len=self._max_model_len)

    def _unless_stopping(self, caught: Exception) -> Exception:
        ends = isinstance(caught, Cancelled) and self._closing.is_set()
        return StageUnavailable("the server is stopping") if ends else caught

    def _follow_request(self, request: Any, reply: triton_io.Reply) -> None:
        started, status = time.monotonic(), 200
        metrics = self._metrics or NoMetrics()
        try:
            with self._tracing.request(triton_io.parameters_of(request)) as span, self._in_flight:
                span.set_attributes({"request_id": reply.request_id} if reply.request_id else {})
                self._answer(request, reply, span)
            metrics.observe("request_seconds", time.monotonic() - started)
        except Exception as caught:
            error = self._unless_stopping(caught)
            reply.fail(error)
            status = from_exception(error).http_status
        metrics.count("requests", status=str(status))

    def _answer(self, request: Any, reply: triton_io.Reply, span: Span) -> None:
        triton_io.refuse_parameters(request, REQUEST_FIELDS)
        inputs: Any = triton_io.arrays_of(request)
        inputs.pop(ABORT, None)
        streams = bool(inputs.pop(STREAM, np.array([True])).reshape(-1)[0]) and self.streams
        timeout_s = timeout_of(inputs)

        def waiting() -> None:
            if streams:
                reply.send(_response(ProgressEvent("thinker", 0, 0)))

        limit_s = timeout_s or self._config.request_timeout_s
        with self._sleep.request(lambda: self._gone(reply), limit_s, waiting) as waited_s:
            if timeout_s is not None and waited_s > REQUEST_S:
                timeout_s = max(timeout_s - waited_s, REQUEST_S)
                inputs["timeout"] = np.array([timeout_s])
            with self._adapters.request(adapter_of(inputs)):
                self._run(request, inputs, streams, timeout_s, reply, span)

    def _run(
        self, request: Any, inputs: Any, streams: bool, timeout_s: float | None, reply: triton_io.Reply, span: Span
    ) -> None:
        stages: Any = None if self._local is None else self._local.engine
        if self._connections is not None:
            headers = tracing.headers_of(triton_io.parameters_of(request))
            stages = TritonStages(self._connections, reply.request_id, headers)
        else:
            inputs = from_tensors(inputs)
        pipeline: Pipeline[Any, Any, Any] = Pipeline(stages, self._config.stage_timeout_s)
        items = pipeline.run(inputs, lambda: self._gone(reply), span, timeout_s)
        if not streams:
            reply.finish(one_response(items))
            return
        for item in items:
            reply.send(_response(item))
        reply.end()

    def _gone(self, reply: triton_io.Reply) -> bool:
        return self._closing.is_set() or reply.cancelled()

    def finalize(self) -> None:
        """End all requests in flight; their last errors and spans still go out."""
        self._closing.set()
        self._in_flight.drain(LAST_S)
        self._state_calls.drain(LAST_S)
        if self._connections is not None:
            self._connections.close(LAST_S)
        if self._local is not None:
            self._local.close()
        if self.streams:
            self._gate.open()
            self._gate.drain(False)
            self._table.reset()
        self._outbox.close()
        self._tracing.close()
        if self._metrics is not None:
            self._metrics.close()
        self._announcement.withdraw()


def timeout_of(inputs: Arrays) -> float | None:
    """The ``timeout`` among a request's tensors; None without one, and for a value that the planner refuses."""
    given = float(inputs["timeout"].reshape(-1)[0]) if "timeout" in inputs else 0.0
    return given if 0 < given < math.inf else None


def adapter_of(inputs: Arrays) -> str | None:
    """The ``lora`` among a request's tensors; None without one, and empty for a value that the planner refuses."""
    if "lora" not in inputs:
        return None
    given = inputs["lora"].reshape(-1)[:1].tolist()
    try:
        return given[0].decode() if given and isinstance(given[0], bytes) else ""
    except UnicodeDecodeError:
        return ""


def _response(item: Item[Any]) -> Arrays:
    if isinstance(item, GeneratedImage | PartialImage):
        event = triton_io.bytes_array(encode_event(item.event))
        return {"event": event, "generated_image": np.asarray(item.pixels)}
    return {"event": triton_io.bytes_array(encode_event(item))}


def one_response(items: Iterator[Item[Any]]) -> Arrays:
    """A whole request in one response: its lasting events, and the images below each other.

    ``event`` [events] has no progress, previews or pieces of texts: the answers have the texts whole.
    ``generated_image`` is uint8 [images * height, width, 3].
    """
    events, images = [], []
    for item in items:
        if isinstance(item, ProgressEvent | TextEvent | PartialImage):
            continue
        events.append(encode_event(item.event if isinstance(item, GeneratedImage) else item))
        if isinstance(item, GeneratedImage):
            images.append(np.asarray(item.pixels))
    arrays: Arrays = {"event": np.array(events, dtype=np.object_)}
    if images:
        arrays["generated_image"] = np.concatenate(images)
    return arrays


class _NoCounters:
    def count_up_to(self, name: str, total: int, **labels: str) -> None:
        """The model ``bagel`` counts."""
