"""A stage as a Triton model: tickets for ``bagel``, one late answer for all other clients."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import ExitStack
from functools import partial
from typing import Any

import msgspec

from bagel_triton.deploy.config import from_environment
from bagel_triton.engine.build import StageResources
from bagel_triton.engine.loop import Job
from bagel_triton.engine.sleep import Engine, SleepingEngine
from bagel_triton.ipc import control_file, liveness
from bagel_triton.ipc.adapters import AdapterTable
from bagel_triton.ipc.liveness import Announcement, end_when
from bagel_triton.ipc.sleep_gate import SleepGate
from bagel_triton.protocol.events import Event, Preview
from bagel_triton.protocol.intervals import WATCH_S
from bagel_triton.protocol.tensors import Arrays
from bagel_triton.telemetry.metrics import SUPERVISOR
from bagel_triton.triton import io as triton_io
from bagel_triton.triton.metrics import TritonMetrics
from bagel_triton.triton.tickets import (
    Adapt,
    Drain,
    Fetch,
    News,
    Poll,
    Sleep,
    StageStatus,
    Status,
    Submit,
    TicketAnswer,
    TicketStore,
    Work,
    decode_call,
)

NEXT_STAGE_S = 5.0  # that an ensemble takes to hand on what a stage answered, at most


class DisconnectWatcher:
    """Aborts the jobs of clients that cancelled their call.

    One thread checks all of them, since each check is a round trip to another process. Triton
    reports a cancelled gRPC call. It does not report a closed HTTP connection (24.10), nor a
    cancelled ensemble to a step that already runs.
    """

    def __init__(self, abort: Callable[[Job[Any, Any]], None]) -> None:
        self._abort = abort
        self._watched: dict[Job[Any, Any], Callable[[], bool]] = {}
        self._lock, self._changed, self._closing = threading.Lock(), threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="disconnects", daemon=True)
        self._thread.start()

    def watch(self, job: Job[Any, Any], cancelled: Callable[[], bool]) -> None:
        """Abort ``job`` when ``cancelled`` becomes true, unless it is done by then."""
        with self._lock:
            self._watched[job] = cancelled
        self._changed.set()

    def close(self) -> None:
        """Stop watching."""
        self._closing.set()
        self._changed.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._closing.is_set():
            with self._lock:
                self._watched = {job: cancelled for job, cancelled in self._watched.items() if not job.done.done()}
                watched = list(self._watched.items())
            if not watched:
                self._changed.wait()
                self._changed.clear()
            for job, cancelled in watched:
                if not job.done.done() and cancelled():
                    self._abort(job)
                    with self._lock:
                        self._watched.pop(job, None)
            self._closing.wait(WATCH_S)


class StageModel:
    """A model around an engine; ``execute`` never waits for the engine.

    A call with the input ``ticket`` is answered at once: see :mod:`bagel_triton.triton.tickets`.
    A call with ``abort``, a request's id, ends that request's work here. Any other call is a
    job of its own and is answered when the engine is done, by Triton's response sender. No orchestrator keeps the
    adapter of such a job loaded, so the stage does.

    A model sets :meth:`build` and :meth:`work`, and :meth:`selftest` if it takes part in one.
    """

    @property
    def engine(self) -> Any:
        """The engine; raises :class:`Asleep` where it sleeps."""
        return self._engine.engine

    def initialize(self, args: dict[str, str]) -> None:
        """Build the engine; an error here is the reason Triton reports."""
        triton_io.use_triton_log()
        self._outbox = triton_io.Outbox()
        config, name = from_environment(), args["model_name"]
        controlled = name == config.control_model
        self.metrics = TritonMetrics([name, *([SUPERVISOR] if controlled else [])])
        level = SleepGate(config.shm_prefix).level  # of a sleep during which this process is started
        self._engine = SleepingEngine(lambda: StageResources.open(config, name), self.build, level)
        self._adapters = AdapterTable(config.shm_prefix, name, {})  # for its locks
        self._disconnects = DisconnectWatcher(self._engine.abort_job)
        self._tickets = TicketStore(self._engine.abort_job, liveness.holds_lock, config.shm_prefix, name)
        self._closing = threading.Event()
        if controlled:
            control_file.start_watching(config.shm_prefix, self.metrics, self._closing)
        end_when(lambda: self._engine.is_lost)
        self._announcement = Announcement(config.shm_prefix, name)

    def build(self, resources: StageResources) -> Engine:
        """This stage's engine, which reports to ``self.metrics``."""
        raise NotImplementedError

    def work(self, inputs: Arrays, request_id: str) -> Work:
        """The job that ``inputs`` describe.

        Raises:
            InvalidRequest: they describe none.
        """
        raise NotImplementedError

    def selftest(self, inputs: Arrays) -> Future[Arrays]:
        """This stage's part in the connector's self-test."""
        raise NotImplementedError

    def execute(self, requests: list[Any]) -> list[Any]:
        """One response a request; None for one that is answered later."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        try:
            inputs = triton_io.arrays_of(request)
            if "ticket" in inputs:
                return self._answer_ticket(inputs, request)
            if "abort" in inputs:
                self._engine.abort(triton_io.text_of(inputs, "abort"))
                return triton_io.response({})
            if "selftest" in inputs:
                tested = self.selftest(inputs)
                triton_io.Reply(request, self._outbox).answer(tested)
                return None
            work = self.work(inputs, request.request_id())
            with ExitStack() as held:
                if name := getattr(work.task, "lora", ""):
                    held.enter_context(self._adapters.using(name))
                job = self.engine.submit(work.task, work.request_id, _ignore, work.scheduling)
                job.done.add_done_callback(partial(_close_soon, held.pop_all()))
        except Exception as error:
            return triton_io.error_response(error)
        reply = triton_io.Reply(request, self._outbox)
        self._disconnects.watch(job, reply.cancelled)
        reply.settle(job.done, work.outputs)
        return None

    def _answer_ticket(self, inputs: Arrays, request: Any) -> Any:
        called = decode_call(bytes(inputs["ticket"].reshape(-1)[0]))
        call, token = called.call, called.token
        outputs: Arrays = {}
        if isinstance(call, Poll):
            return self._answer_poll(call, token, request)
        if isinstance(call, Status):
            return triton_io.response(_ticket(TicketAnswer(token, status=self._status(call))))
        if isinstance(call, Fetch):
            outputs = self._tickets.fetch(call)
        elif isinstance(call, Drain):
            self._tickets.drain(call.on)
        elif isinstance(call, Sleep):
            self._engine.change(call.level)
        elif isinstance(call, Adapt):
            self._engine.adapt(call.name, call.path)
        else:
            self._submit(call, inputs, request.request_id())
        ticket = {"ticket": triton_io.message_array(TicketAnswer(token))}
        return triton_io.response({**ticket, **outputs}, request.requested_output_names())

    def _status(self, call: Status) -> StageStatus:
        adapters = tuple(self._engine.adapters()[0])
        level, changing, failure = self._engine.state()
        status = self._tickets.status(call)
        return msgspec.structs.replace(status, asleep=level, changing=changing, failure=failure, adapters=adapters)

    def _submit(self, call: Submit, inputs: Arrays, request_id: str) -> None:
        def start(progress: Any) -> tuple[Work, Job[Any, Any]]:
            work = self.work(inputs, request_id)

            def report(event: Event | Preview[Any]) -> None:
                if isinstance(event, Preview):
                    event = Preview(event.event, work.outputs([event.latents]))
                progress(event)

            return work, self.engine.submit(work.task, work.request_id, report, work.scheduling)

        self._tickets.submit(call, start)

    def _answer_poll(self, call: Poll, token: int, request: Any) -> Any:
        if call.wait_s:
            reply = triton_io.Reply(request, self._outbox)
            self._tickets.poll(call, lambda news: reply.finish(_ticket(TicketAnswer(token, news))))
            return None
        news: list[News] = []
        self._tickets.poll(call, news.append)
        return triton_io.response(_ticket(TicketAnswer(token, news[0])))

    def finalize(self) -> None:
        """Stop the engine, then send the last answers."""
        self._closing.set()
        self._disconnects.close()
        self._engine.close()
        self._tickets.close()
        self._outbox.close()
        self.metrics.close()
        self._announcement.withdraw()


def _ticket(answer: TicketAnswer) -> Arrays:
    return {"ticket": triton_io.message_array(answer)}


def _close_soon(held: ExitStack, done: Future[Any]) -> None:
    """Close ``held`` when an ensemble has had the time to call its next stage."""
    timer = threading.Timer(NEXT_STAGE_S, held.close)
    timer.daemon = True
    timer.start()


def _ignore(event: Event) -> None:
    """A direct client gets no events: it is answered once."""
