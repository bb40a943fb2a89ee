"""Sleep and wake, as the orchestrators see them: ``bagel`` changes the server's state, and both keep requests out."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal, Protocol

from bagel_triton.ipc.sleep_gate import SleepGate
from bagel_triton.protocol.errors import Asleep, BagelError, Cancelled, DeadlineExceeded, StageUnavailable, from_text
from bagel_triton.protocol.intervals import HEARTBEAT_S, REQUEST_S
from bagel_triton.protocol.sleep import SleepCall, SleepState, State
from bagel_triton.telemetry.metrics import Metrics
from bagel_triton.triton.stages import ModelCall
from bagel_triton.triton.tickets import Sleep, Status, exchange

CHANGE_S = 900.0  # for every stage to fall asleep or wake; the weights of a slow disk take minutes
Policy = Literal["wait", "refuse"]


class Sleeper(Protocol):
    """One stage, or all where one process has them."""

    def change(self, level: int) -> None:
        """Begin to sleep at ``level``, or to wake with 0.

        Raises:
            BagelError: it does not answer, as of :meth:`state`.
        """

    def state(self) -> tuple[int, bool, str]:
        """The level of its sleep, whether that is changing, and the text form of what the last change failed with."""


class StageSleeper:
    """A stage that ``call`` reaches."""

    def __init__(self, call: ModelCall) -> None:
        self._call = call

    def change(self, level: int) -> None:
        exchange(self._call, Sleep(level))

    def state(self) -> tuple[int, bool, str]:
        answer, _ = exchange(self._call, Status())
        if (status := answer.status) is None:
            raise StageUnavailable("a stage answered without its status")
        return status.asleep, status.changing, status.failure


class ServerSleep:
    """The state of a whole server; every method is safe from any thread.

    Args:
        gate: shared by the server's processes.
        while_asleep: how requests are handled meanwhile.
        sleepers: the stages by name, as they are now.
        metrics: gets ``asleep``.
    """

    def __init__(
        self, gate: SleepGate, while_asleep: Policy, sleepers: Callable[[], Mapping[str, Sleeper]], metrics: Metrics
    ) -> None:
        self._gate, self._policy, self._sleepers, self._metrics = gate, while_asleep, sleepers, metrics
        self._changing: State | None = None
        self._lock = threading.Lock()
        metrics.gauge("asleep", float(gate.level > 0))

    def answer(self, call: SleepCall, gone: Callable[[], bool]) -> SleepState:
        """The state once ``call`` has been carried out.

        Requests in flight end before a sleep. ``gone`` gives up the wait for them, and the server stays awake.

        Raises:
            BagelError: a stage failed or does not answer.
        """
        if call.action in ("drain", "resume"):
            self._gate.drain(call.action == "drain")
        elif call.action != "state":
            with self._lock:
                try:
                    self._sleep(call.level, gone) if call.action == "sleep" else self._wake()
                finally:
                    self._changing = None
                    self._metrics.gauge("asleep", float(self._gate.level > 0))
        level = self._gate.level
        if self._gate.draining:
            return SleepState("drained" if self._gate.idle else "draining", level, "refuse")  # type: ignore[arg-type]
        state: State = self._changing or ("asleep" if level else "awake")
        return SleepState(state, level, self._policy)  # type: ignore[arg-type]

    @contextmanager
    def request(self, gone: Callable[[], bool], timeout_s: float, waiting: Callable[[], None]) -> Iterator[float]:
        """Keeps the server awake; the seconds that the request has waited for it to be.

        ``waiting`` is called once a second meanwhile.

        Raises:
            StageUnavailable: the server drains.
            Asleep: the server sleeps, and refuses requests.
            Cancelled: the client left.
            DeadlineExceeded: ``timeout_s`` passed.
        """
        began = told = time.monotonic()
        while not self._enter():
            now = time.monotonic()
            if self._policy == "refuse":
                raise Asleep("the server is asleep; try again later")
            if gone():
                raise Cancelled("the client left while the server was asleep")
            if now - began > timeout_s:
                raise DeadlineExceeded("the request's timeout passed while the server was asleep", "timeout")
            if now - told > HEARTBEAT_S:
                told = now
                waiting()
            time.sleep(REQUEST_S)
        try:
            yield time.monotonic() - began
        finally:
            self._gate.leave()

    def _enter(self) -> bool:
        """Count a request in; False while the server sleeps."""
        entered = self._gate.enter()
        # Looked at once the request counts: a drain that begins now waits for it.
        if not self._gate.draining:
            return entered
        if entered:
            self._gate.leave()
        raise StageUnavailable("the server drains: it finishes the requests that it has and takes no new ones")

    def _sleep(self, level: int, gone: Callable[[], bool]) -> None:
        if gone():  # while another change was under way
            raise Cancelled("the client left before the server was asleep")
        before = self._gate.level
        self._changing = "falling asleep"
        self._gate.close(max(level, before))
        while not self._gate.idle:
            if gone():
                self._gate.open()
                raise Cancelled("the client left before the server was asleep; it stays awake")
            time.sleep(REQUEST_S)
        self._change(max(level, before))

    def _wake(self) -> None:
        if self._gate.level:
            self._changing = "waking"
            self._change(0)
            self._gate.open()

    def _change(self, level: int) -> None:
        """Have every stage sleep at ``level``, or wake with 0, all at once."""
        until = time.monotonic() + CHANGE_S
        waiting = dict(self._sleepers())
        begun: set[str] = set()
        while waiting:
            for name, stage in list(waiting.items()):
                try:
                    if name not in begun:
                        stage.change(level)
                        begun.add(name)
                    now, changing, failure = stage.state()
                except BagelError as error:
                    # Dead: it is started again asleep, and called again until the time is over.
                    begun.discard(name)
                    if time.monotonic() > until:
                        raise StageUnavailable(f"{name} does not answer: {error.message}") from error
                    continue
                if failure:
                    reason = from_text(failure).message
                    raise StageUnavailable(f"{name} could not {'sleep' if level else 'wake'}: {reason}")
                if not changing and (now >= level if level else now == 0):
                    del waiting[name]
            if time.monotonic() > until:
                raise StageUnavailable(f"{', '.join(waiting)}: not {'asleep' if level else 'awake'} in {CHANGE_S:g} s")
            if waiting:
                time.sleep(REQUEST_S)
