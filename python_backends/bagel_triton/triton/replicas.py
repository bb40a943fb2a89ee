"""The servers of stage 1 that one orchestrator calls: a connection to each, and which of them gets a request."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence

from bagel_triton.deploy.config import Policy
from bagel_triton.deploy.topology import DIT
from bagel_triton.pipeline.balancer import Assignment, Balancer, MemberStatus, State
from bagel_triton.protocol.errors import BagelError, StageUnavailable
from bagel_triton.protocol.intervals import WATCH_S
from bagel_triton.telemetry.metrics import Metrics
from bagel_triton.triton.client import READY_S, RemoteServer
from bagel_triton.triton.stages import ModelCall, TicketClient
from bagel_triton.triton.tickets import Adapt, StageStatus, exchange

RETRY_S = 10.0  # between calls to load an adapter
LAST_S = 0.5  # for the aborts that are queued for a server that leaves
# A server that has just come back is in after its next check; /health, which asks it, is sooner.
SETTLE_S = 4 * WATCH_S


class Replica:
    """A server of stage 1: its readiness, and the tickets of each of its ``models``."""

    def __init__(
        self,
        address: str,
        models: Sequence[str],
        balancer: Balancer,
        reported: Callable[[], None] = lambda: None,
        adapters: Callable[[], Mapping[str, str]] = dict,
        initial: Collection[str] = (),
    ) -> None:
        self.address, self._balancer, self._reported, self._adapters = address, balancer, reported, adapters
        self._initial = initial
        self._brought: dict[str, tuple[str, float]] = {}  # adapters that it was called to load: path, and when
        self.server = RemoteServer(address, models, self._report)
        self.clients = {model: TicketClient(self.server.model_call(model)) for model in models}
        self._ask = self.server.model_call(DIT, READY_S)
        self.server.start()

    def close(self, timeout_s: float) -> None:
        """Stop; aborts that are queued get up to ``timeout_s`` seconds a model."""
        for client in self.clients.values():
            client.close(timeout_s)
        self.server.close()

    def _report(self) -> None:
        self._check()
        self._reported()

    def _check(self) -> None:
        if not self.server.ready:
            self._balancer.report(self.address, "down")
            self._brought.clear()
            return
        # A stage that is too busy to answer keeps the state that it had: its readiness decides whether it is there.
        with contextlib.suppress(BagelError):
            answer, _ = exchange(self._ask, self.clients[DIT].status_message())
            if (status := answer.status) is not None:
                state: State = "draining" if status.draining or self._bring_adapters(status) else "ready"
                self._balancer.report(self.address, state, status.work_of_others)

    def _bring_adapters(self, status: StageStatus) -> bool:
        """Have it load an adapter that was loaded before it came; whether it is at that, and gets no request."""
        if status.asleep:
            return False
        for name, path in self._adapters().items():
            brought, called_at = self._brought.get(name, ("", 0.0))
            if name in status.adapters and (brought == path or name not in self._initial):
                continue
            if status.changing:
                return True
            # Its adapter of an initial name may be the first of that name. A failed load is tried again.
            if brought != path or time.monotonic() - called_at > RETRY_S:
                self._brought[name] = path, time.monotonic()
                with contextlib.suppress(BagelError):
                    exchange(self._ask, Adapt(name, path))
                    return True  # the next at the next check, as it loads one at a time
        return False


class Replicas:
    """Every server of stage 1, by address; they come and go while requests run.

    Args:
        models: the Triton models of stage 1.
        addresses: gRPC addresses, HOST:PORT, of the servers known at the start.
        policy: how requests are shared among them.
        metrics: gets the state of each.
        adapters: paths of the adapters that every server needs beside its own, by name.
        initial: names of its own, which those may have taken over.
    """

    def __init__(
        self,
        models: Sequence[str],
        addresses: Sequence[str],
        policy: Policy,
        metrics: Metrics,
        adapters: Callable[[], Mapping[str, str]] = dict,
        initial: Collection[str] = (),
    ) -> None:
        self.models, self._metrics, self._adapters = tuple(models), metrics, (adapters, initial)
        self.balancer = Balancer(policy)
        self._lock, self._replicas = threading.Lock(), dict[str, Replica]()
        self._checked = threading.Condition(self._lock)
        self._show_lock, self._shown = threading.Lock(), dict[str, tuple[float, ...]]()
        self.set_addresses(addresses)

    def set_addresses(self, addresses: Sequence[str]) -> None:
        """Call these servers from now on, and no others."""
        with self._lock:
            left = [self._replicas.pop(address) for address in self._replicas.keys() - set(addresses)]
            self.balancer.set_members(addresses)
            for address in addresses:
                if address not in self._replicas:
                    self._replicas[address] = Replica(address, self.models, self.balancer, self._note, *self._adapters)
        for replica in left:
            replica.close(LAST_S)
        self._show()

    def take(self, work: int, avoid: Collection[str] = ()) -> tuple[Replica, Assignment]:
        """A server for ``work``; see :meth:`Balancer.take`. Waits up to ``SETTLE_S`` where none is ready."""
        until = time.monotonic() + SETTLE_S
        with self._lock:
            while True:
                try:
                    assignment = self.balancer.take(work, avoid)
                except StageUnavailable:
                    if not self._checked.wait(max(0.0, until - time.monotonic())):
                        raise
                else:
                    return self._replicas[assignment.address], assignment

    def stage_calls(self, reachable: bool = False) -> dict[str, ModelCall]:
        """The call of every model of every server; with ``reachable`` of those that are not down, if there are any."""
        with self._lock:
            replicas = list(self._replicas.values())
        up = [replica for replica in replicas if self.balancer.state(replica.address) != "down"]
        replicas = up if reachable and up else replicas
        return {
            f"{model} at {replica.address}": replica.server.model_call(model, READY_S)
            for replica in replicas
            for model in self.models
        }

    def retried(self) -> None:
        """Count a request that is tried at another server."""
        self._metrics.count("stage_retries")

    def close(self, timeout_s: float) -> None:
        """Stop; aborts that are queued get up to ``timeout_s`` seconds a model."""
        with self._lock:
            replicas, self._replicas = list(self._replicas.values()), {}
        for replica in replicas:
            replica.close(timeout_s)

    def _note(self) -> None:
        with self._lock:
            self._checked.notify_all()
        self._show()

    def _show(self) -> None:
        """Bring the metrics up to date."""
        with self._show_lock:
            statuses = self.balancer.statuses()
            for address in self._shown.keys() | statuses.keys():
                status = statuses.get(address, MemberStatus("down", 0))
                values = (float(status.state == "ready"), float(status.state == "draining"), float(status.requests))
                if self._shown.get(address) != values:
                    self._shown[address] = values
                    for name, value in zip(("ready", "draining", "requests"), values, strict=True):
                        self._metrics.gauge(f"replica_{name}", value, address=address)
