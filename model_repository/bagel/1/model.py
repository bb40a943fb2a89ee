"""The orchestrator as a Triton model: a request's tensors in, a stream of events out."""

import threading
import time
from typing import Any

import numpy as np

from bagel_triton.deploy.config import from_environment
from bagel_triton.ipc import control_file as notices
from bagel_triton.ipc.liveness import Announcement, end_when, end_with_parent
from bagel_triton.pipeline.in_flight import InFlight
from bagel_triton.pipeline.pipeline import GeneratedImage, Pipeline
from bagel_triton.protocol.errors import Cancelled, StageUnavailable, from_exception
from bagel_triton.protocol.events import encode_event
from bagel_triton.protocol.request import REQUEST_FIELDS
from bagel_triton.protocol.tensors import from_tensors
from bagel_triton.telemetry import tracing
from bagel_triton.telemetry.metric_defs import CATALOGUE, SUPERVISOR
from bagel_triton.telemetry.spans import Span
from bagel_triton.triton import io as triton_io
from bagel_triton.triton.client import RemoteModels
from bagel_triton.triton.metrics import TritonMetrics
from bagel_triton.triton.stages import StageConnections, TritonStages

LAST_S = 0.5  # for requests that are told to end


class TritonPythonModel:
    """Chains the stages, which are other models, or engines in this process where the topology has but one.

    A thread follows each request.
    """

    def initialize(self, args: dict[str, str]) -> None:
        """Nothing is loaded here, unless everything is."""
        triton_io.use_triton_log()
        self._outbox, config = triton_io.Outbox(), from_environment()
        one_process = config.topology.one_process
        self._metrics = TritonMetrics(tuple(CATALOGUE) if one_process else [args["model_name"], SUPERVISOR])
        self._config, self._local = config.bagel, None
        if one_process:
            from bagel_triton.pipeline.local import LocalStages  # otherwise this process needs no torch

            self._local = LocalStages(config, self._metrics)
            for engine in (self._local.thinker, self._local.dit, self._local.decoder):
                end_when(engine.lost)
        self._tracing = tracing.from_environment()
        self._closing, self._in_flight = threading.Event(), InFlight(config.bagel.max_inflight, self._metrics)
        notices.start_watching(config.shm_prefix, self._metrics, self._closing)
        end_with_parent()
        self._announcement = Announcement(config.shm_prefix, args["model_name"])
        self._remote = RemoteModels(config.remote)
        self._connections = None
        if not one_process:
            here = triton_io.model_call, self._announcement, config.shm_prefix
            self._connections = StageConnections(*here, self._remote)

    def execute(self, requests: list[Any]) -> None:
        """Follow every request from a thread of its own."""
        for request in requests:
            reply = triton_io.Reply(request, self._outbox)
            threading.Thread(target=self._follow, args=(request, reply), daemon=True).start()

    def _follow(self, request: Any, reply: triton_io.Reply) -> None:
        started, status = time.monotonic(), 200
        try:
            with self._tracing.request(triton_io.parameters_of(request)) as span, self._in_flight:
                span.set_attributes({"request_id": reply.request_id} if reply.request_id else {})
                self._answer(request, reply, span)
            self._metrics.observe("request_seconds", time.monotonic() - started)
        except Exception as caught:
            ends = isinstance(caught, Cancelled) and self._closing.is_set()
            error = StageUnavailable("the server is stopping") if ends else caught
            reply.fail(error)
            status = from_exception(error).http_status
        self._metrics.count("requests", status=str(status))

    def _answer(self, request: Any, reply: triton_io.Reply, span: Span) -> None:
        triton_io.refuse_parameters(request, REQUEST_FIELDS)
        inputs: Any = triton_io.arrays_of(request)
        stages: Any = self._local
        if self._connections is not None:
            headers = tracing.headers_of(triton_io.parameters_of(request))
            stages = TritonStages(self._connections, reply.request_id, headers)
        else:
            inputs = from_tensors(inputs)
        pipeline: Pipeline[Any, Any, Any] = Pipeline(stages, self._config.stage_timeout_s)
        for item in pipeline.run(inputs, lambda: self._gone(reply), span):
            self._send(item, reply)
        reply.end()

    def _gone(self, reply: triton_io.Reply) -> bool:
        return self._closing.is_set() or reply.cancelled()

    def _send(self, item: Any, reply: triton_io.Reply) -> None:
        if isinstance(item, GeneratedImage):
            event = triton_io.bytes_array(encode_event(item.event))
            reply.send({"event": event, "generated_image": np.asarray(item.pixels)})
        else:
            reply.send({"event": triton_io.bytes_array(encode_event(item))})

    def finalize(self) -> None:
        """End what is in flight; the last errors and spans still go out."""
        self._closing.set()
        self._in_flight.drain(LAST_S)
        if self._connections is not None:
            self._connections.close(LAST_S)
        self._remote.close()
        if self._local:
            self._local.close()
        self._outbox.close()
        self._tracing.close()
        self._metrics.close()
        self._announcement.withdraw()
