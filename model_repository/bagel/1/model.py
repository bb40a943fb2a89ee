"""Triton's rim of the orchestrator: a request's tensors in, a stream of events out."""

import threading
import time
from typing import Any

import numpy as np

from bagel_triton import triton_io
from bagel_triton.deploy.config import from_environment
from bagel_triton.engine.pipeline import Picture, Pipeline
from bagel_triton.errors import Overloaded, from_exception
from bagel_triton.events import encode_event
from bagel_triton.liveness import Announcement
from bagel_triton.request import from_tensors
from bagel_triton.triton_metrics import TritonMetrics
from bagel_triton.triton_stages import TritonStages


class TritonPythonModel:
    """Chains the stages: over gRPC, or in this process where the topology has but one.

    A thread follows each request.
    """

    def initialize(self, args: dict[str, str]) -> None:
        """Nothing is loaded here, unless everything is."""
        triton_io.use_triton_log()
        self._outbox, self._metrics = triton_io.Outbox(), TritonMetrics()
        config = from_environment()
        self._config, self._shm_prefix, self._local = config.bagel, config.shm_prefix, None
        if config.topology.one_process:
            from bagel_triton.engine.build import LocalStages  # otherwise this process needs no torch

            self._local = LocalStages(config, self._metrics)
        self._closing = threading.Event()
        self._slots = threading.BoundedSemaphore(self._config.max_inflight)
        self._announcement = Announcement(config.shm_prefix, args["model_name"])

    def execute(self, requests: list[Any]) -> None:
        """Follow every request from a thread of its own."""
        for request in requests:
            reply = triton_io.Reply(request, self._outbox)
            if self._slots.acquire(blocking=False):
                threading.Thread(target=self._follow, args=(request, reply), daemon=True).start()
            else:
                self._metrics.count("requests", status="429")
                reply.fail(Overloaded(f"{self._config.max_inflight} requests are in flight already"))

    def _follow(self, request: Any, reply: triton_io.Reply) -> None:
        started = time.monotonic()
        try:
            triton_io.refuse_parameters(request)
            inputs: Any = triton_io.arrays_of(request)
            stages: Any = self._local or TritonStages(request, self._shm_prefix)
            if self._local:
                inputs = from_tensors(inputs)
            for item in Pipeline(stages, self._config.stage_timeout_s).run(inputs, lambda: self._gone(reply)):
                self._send(item, reply)
            reply.finish()
            self._metrics.count("requests", status="200")
        except Exception as error:
            reply.fail(error)
            self._metrics.count("requests", status=str(from_exception(error).http_status))
        finally:
            self._metrics.observe("request_seconds", time.monotonic() - started)
            self._slots.release()

    def _gone(self, reply: triton_io.Reply) -> bool:
        return self._closing.is_set() or reply.cancelled()

    def _send(self, item: Any, reply: triton_io.Reply) -> None:
        if isinstance(item, Picture):
            event = triton_io.bytes_array(encode_event(item.event))
            reply.send({"event": event, "generated_image": np.asarray(item.pixels)})
        else:
            reply.send({"event": triton_io.bytes_array(encode_event(item))})

    def finalize(self) -> None:
        """End what is in flight; the last errors still go out."""
        self._closing.set()
        if self._local:
            self._local.close()
        self._outbox.close()
        self._metrics.close()
        self._announcement.withdraw()
