"""The same worker as a decoupled model: two events, then the result."""

import queue
import threading
from typing import Any

from bagel_triton.protocol.events import ProgressEvent, encode_event
from bagel_triton.triton import io as triton_io


class TritonPythonModel:
    """``x`` -> ``event``, ``event``, ``y``."""

    def initialize(self, args: dict[str, str]) -> None:
        self._outbox = triton_io.Outbox()
        self._jobs: queue.SimpleQueue[tuple[Any, triton_io.Reply]] = queue.SimpleQueue()
        threading.Thread(target=self._run, daemon=True).start()

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            x = triton_io.arrays_of(request)["x"]
            self._jobs.put((x, triton_io.Reply(request, self._outbox)))

    def _run(self) -> None:
        while True:
            x, reply = self._jobs.get()
            for step in (1, 2):
                reply.send({"event": triton_io.bytes_array(encode_event(ProgressEvent("dit", step, 2)))})
            reply.finish({"y": x})

    def finalize(self) -> None:
        self._outbox.close()
