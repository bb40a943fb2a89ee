"""A stage whose engine answers at once, after two events."""

import queue
import threading
from collections.abc import Callable
from typing import Any

from bagel_triton.engine.loop import Job
from bagel_triton.ipc import liveness
from bagel_triton.protocol.events import Event, ProgressEvent
from bagel_triton.protocol.messages import SchedulingParams
from bagel_triton.protocol.tensors import Arrays
from bagel_triton.triton import io as triton_io
from bagel_triton.triton.stage_model import DisconnectWatcher, StageModel
from bagel_triton.triton.tickets import TicketStore, Work


class EchoEngine:
    """One thread, as an engine has; stands in the place of a :class:`SleepingEngine`, and never sleeps."""

    def __init__(self) -> None:
        self.engine = self
        self._jobs: queue.SimpleQueue[Job[Any, Any]] = queue.SimpleQueue()
        threading.Thread(target=self._run, daemon=True).start()

    def submit(
        self, task: Any, request_id: str, progress: Callable[[Event], None], scheduling: SchedulingParams
    ) -> Job[Any, Any]:
        job: Job[Any, Any] = Job(request_id, task, progress, scheduling)
        self._jobs.put(job)
        return job

    def abort_job(self, job: object) -> None:
        """Nothing is kept."""

    def _run(self) -> None:
        while True:
            job = self._jobs.get()
            for step in (1, 2):
                job.progress(ProgressEvent("dit", step, 2))
            job.finish(job.task, "dit")


class TritonPythonModel(StageModel):
    """``x`` -> ``y``, the same."""

    def initialize(self, args: dict[str, str]) -> None:
        self._outbox = triton_io.Outbox()
        self._engine = EchoEngine()  # type: ignore[assignment]  # all of it that a ticket uses
        self._disconnects = DisconnectWatcher(self._engine.abort_job)
        self._tickets = TicketStore(self._engine.abort_job, liveness.holds_lock, "bench_hop", args["model_name"])

    def work(self, inputs: Arrays, request_id: str) -> Work:
        return Work(inputs["x"], request_id, lambda x: {"y": x})

    def finalize(self) -> None:
        self._disconnects.close()
        self._tickets.close()
        self._outbox.close()
