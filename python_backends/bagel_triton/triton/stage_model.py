"""What the Triton models of the stages have in common."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Protocol

from bagel_triton.deploy.config import from_environment
from bagel_triton.deploy.topology import DECODER, DIT, THINKER
from bagel_triton.engine.build import StageResources
from bagel_triton.engine.loop import Job
from bagel_triton.ipc import control_file as notices
from bagel_triton.ipc import liveness
from bagel_triton.ipc.liveness import Announcement, end_when, end_with_parent
from bagel_triton.protocol.events import Event
from bagel_triton.protocol.messages import Pulse, SchedulingParams
from bagel_triton.protocol.tensors import Arrays
from bagel_triton.telemetry.metric_defs import SUPERVISOR
from bagel_triton.triton import client as triton_call
from bagel_triton.triton import io as triton_io
from bagel_triton.triton.cancellation import DisconnectWatcher
from bagel_triton.triton.metrics import TritonMetrics

NEXT = {THINKER: DIT, DIT: DECODER}  # in the ensemble


class Engine(Protocol):
    """What a stage model needs of its engine."""

    lost: threading.Event

    def cancel(self, request_id: str) -> None:
        """Drop what a request has here."""

    def drop(self, job: Job[Any, Any]) -> None:
        """Drop this job."""

    def close(self) -> None:
        """Stop."""


class StageModel:
    """A decoupled model around an engine: ``execute`` queues and returns.

    A model sets ``build`` and ``accept``. Every stage takes the optional BYTES input
    ``cancel``, a request id to drop, and answers it with nothing but the final flag; so it
    does a ``pulse`` that comes alone.
    """

    engine: Any

    def initialize(self, args: dict[str, str]) -> None:
        """Build the engine; an error here is the reason Triton reports."""
        triton_io.use_triton_log()
        self._outbox = triton_io.Outbox()
        config, name = from_environment(), args["model_name"]
        self._name, self._shm_prefix = name, config.shm_prefix
        heeds = name == config.control_model
        self.metrics = TritonMetrics([name, *([SUPERVISOR] if heeds else [])])
        parts = StageResources.open(config)
        self.engine, self._weights = self.build(parts), parts.weights
        self._departures = DisconnectWatcher(self.engine.drop)
        self._closing = threading.Event()
        if heeds:
            notices.start_watching(config.shm_prefix, self.metrics, self._closing)
        end_with_parent()
        end_when(self.engine.lost)
        self._announcement = Announcement(config.shm_prefix, name)

    def build(self, parts: StageResources) -> Engine:
        """This stage's engine, which tells ``self.metrics`` of its work."""
        raise NotImplementedError

    def accept(self, inputs: Arrays, reply: triton_io.Reply) -> None:
        """Queue one request and arrange for its answer."""
        raise NotImplementedError

    def work(
        self, task: Any, request_id: str, inputs: Arrays, reply: triton_io.Reply, schedule: SchedulingParams
    ) -> Any:
        """The engine's job for ``task``, dropped when the client goes; its events go to a client that asked.

        Triton does not tell an ensemble's running step that its client has gone, only the steps
        that it starts afterwards. So a running step makes it start one, time and again: its
        ``pulse`` goes to the next stage, which sees whether the ensemble is cancelled (``_on_pulse``).
        """
        job = self.engine.submit(task, request_id, self.listener(inputs, reply), schedule)
        gone: Callable[[], bool] = reply.cancelled
        if reply.in_ensemble:
            gone = reply.pulsing(Pulse(self._name, request_id), liveness.watch(self._shm_prefix, NEXT[self._name]))
        self._departures.watch(job, gone)
        return job

    def _on_pulse(self, pulse: Pulse, reply: triton_io.Reply) -> None:
        """Have the stage before drop its request, if the ensemble that passed on the pulse is cancelled."""
        if reply.cancelled(0.0):
            where = (triton_call.own_address(), pulse.stage, pulse.request_id)
            threading.Thread(target=triton_call.drop, args=where).start()
        reply.finish()

    def listener(self, inputs: Arrays, reply: triton_io.Reply) -> Callable[[Event], None]:
        """Where the engine's events go: to the client that set ``progress``, else nowhere.

        An ensemble takes every response for the answer, so it must get no events.
        """
        wanted = "progress" in inputs and bool(inputs["progress"].reshape(-1)[0])
        return reply.event if wanted else _ignore

    def execute(self, requests: list[Any]) -> None:
        """Queue every request; answers follow from the engine."""
        for request in requests:
            reply = triton_io.Reply(request, self._outbox)
            try:
                inputs = triton_io.arrays_of(request)
                if "cancel" in inputs:
                    self.engine.cancel(triton_io.text_of(inputs, "cancel"))
                    reply.finish()
                elif inputs.keys() == {"pulse"}:
                    self._on_pulse(triton_io.message_of(inputs, "pulse", Pulse), reply)
                else:
                    self.accept(inputs, reply)
            except Exception as error:
                reply.fail(error)

    def finalize(self) -> None:
        """Stop the engine, then send the last answers."""
        self._closing.set()
        self._departures.close()
        self.engine.close()
        self._weights.close()
        self._outbox.close()
        self.metrics.close()
        self._announcement.withdraw()


def _ignore(event: Event) -> None:
    """Nobody listens."""
