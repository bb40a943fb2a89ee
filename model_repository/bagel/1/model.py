"""Triton's rim of the orchestrator: a request's tensors in, a stream of events out."""

import threading
from typing import Any

from bagel_triton import triton_io
from bagel_triton.deploy.config import from_environment
from bagel_triton.engine.pipeline import Picture, Pipeline
from bagel_triton.errors import Overloaded
from bagel_triton.messages import encode_event
from bagel_triton.triton_stages import TritonStages


class TritonPythonModel:
    """Chains the stages by BLS; a thread follows each request, none computes."""

    def initialize(self, args: dict[str, str]) -> None:
        """Nothing is loaded here."""
        triton_io.use_triton_log()
        self._config = from_environment().bagel
        self._outbox = triton_io.Outbox()
        self._closing = threading.Event()
        self._slots = threading.BoundedSemaphore(self._config.max_inflight)

    def execute(self, requests: list[Any]) -> None:
        """Follow every request from a thread of its own."""
        for request in requests:
            reply = triton_io.Reply(request, self._outbox)
            if self._slots.acquire(blocking=False):
                threading.Thread(target=self._follow, args=(request, reply), daemon=True).start()
            else:
                reply.fail(Overloaded(f"{self._config.max_inflight} requests are in flight already"))

    def _follow(self, request: Any, reply: triton_io.Reply) -> None:
        stages = TritonStages(request)
        try:
            self._relay(Pipeline(stages, self._config.stage_timeout_s), request, reply)
        except Exception as error:
            reply.fail(error)
        finally:
            self._slots.release()

    def _relay(self, pipeline: Any, request: Any, reply: triton_io.Reply) -> None:
        inputs = triton_io.arrays_of(request)
        for item in pipeline.run(inputs, lambda: self._closing.is_set() or reply.cancelled()):
            if isinstance(item, Picture):
                event = triton_io.bytes_array(encode_event(item.event))
                reply.send({"event": event, "generated_image": item.pixels})
            else:
                reply.send({"event": triton_io.bytes_array(encode_event(item))})
        reply.finish()

    def finalize(self) -> None:
        """End what is in flight; the last errors still go out."""
        self._closing.set()
        self._outbox.close()
