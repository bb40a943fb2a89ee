"""The stages as ``bagel`` reaches them: its own server's by BLS, those of other hosts over gRPC, all by tickets.

Two threads a stage, however many requests are in flight. One makes the short calls, in
order: submit, fetch, abort. The other polls, woken by the stage's doorbell; a bell that is lost
costs :data:`~bagel_triton.protocol.intervals.WATCH_S`. Without open tickets nothing is polled.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import secrets
import socket
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np

from bagel_triton.deploy.topology import DECODER, DIT, EXPANDER, THINKER
from bagel_triton.engine.preprocess.image_input import is_heavy
from bagel_triton.ipc import liveness
from bagel_triton.ipc.liveness import Announcement
from bagel_triton.pipeline.balancer import Assignment
from bagel_triton.pipeline.pipeline import StageCall
from bagel_triton.protocol.errors import BagelError, Internal, StageUnavailable, from_exception, from_text
from bagel_triton.protocol.events import Preview, Stage, StageStats, decode_stats
from bagel_triton.protocol.intervals import WATCH_S
from bagel_triton.protocol.messages import (
    LATENT_STRIDE,
    DenoiseJob,
    FlowSettings,
    Message,
    Plan,
    SchedulingParams,
    ThinkerOutput,
    decode,
    encode,
)
from bagel_triton.protocol.tensors import Array, Arrays
from bagel_triton.triton.tickets import (
    Failed,
    Fetch,
    Finished,
    News,
    Poll,
    Previewed,
    Progress,
    Status,
    Submit,
    TicketEvent,
    exchange,
    unpack,
)

if TYPE_CHECKING:
    from bagel_triton.triton.replicas import Replica, Replicas

# BLS calls that may wait at a time: these, and two for each stage with tickets. Triton has 32
# threads for a model's BLS calls, which also send the model's own responses.
EXPANDER_CALLS = 2
Result = TypeVar("Result")
log = logging.getLogger(__name__)


class ModelCall(Protocol):
    """One unary call of a stage's model."""

    def __call__(
        self, arrays: Arrays, outputs: Sequence[str], request_id: str, headers: Mapping[str, str] | None = None
    ) -> Arrays:
        """The model's answer; ``headers`` go with a call that leaves this server.

        Raises:
            BagelError: the model's error.
        """


class Doorbell:
    """An abstract Unix datagram socket that a stage rings when there is news."""

    def __init__(self, prefix: str) -> None:
        self.name = f"{prefix}_doorbell_{secrets.token_hex(8)}"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._socket.bind(f"\0{self.name}")

    def wait(self, seconds: float) -> None:
        """Return when it rang, or after ``seconds``."""
        self._socket.settimeout(seconds)
        with contextlib.suppress(TimeoutError):
            self._socket.recv(1)
            self._socket.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    self._socket.recv(1)

    def close(self) -> None:
        """Take the name back."""
        self._socket.close()


@dataclass(eq=False)
class _Open:
    """A ticket whose result has not come yet."""

    call: StageCall[Any]
    outputs: tuple[str, ...]
    result: Callable[[Arrays], Any]
    request_id: str
    submitted: bool = False
    stats: StageStats | None = field(default=None)  # set when its result has to be fetched


class TicketClient:
    """One stage's tickets.

    ``doorbell`` and ``lock`` belong to a caller on the stage's own host; without a doorbell a
    poll waits at the stage instead, which is safe over gRPC, whose calls have a deadline.
    """

    def __init__(self, call: ModelCall, doorbell: Doorbell | None = None, lock: str | None = None) -> None:
        self._call, self._doorbell, self._lock_name = call, doorbell, lock
        self._doorbell_name = None if doorbell is None else doorbell.name
        self._owner = secrets.token_hex(16)
        self._cursor, self._newest = "", 0
        self._open: dict[int, _Open] = {}
        self._lock, self._busy, self._closing = threading.Lock(), threading.Event(), threading.Event()
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=target, name=name, daemon=True)
            for target, name in ((self._make_calls, "stage-calls"), (self._keep_polling, "stage-poller"))
        ]
        for thread in self._threads:
            thread.start()

    def submit(
        self,
        call: StageCall[Result],
        arrays: Arrays,
        outputs: Sequence[str],
        result: Callable[[Arrays], Result],
        request_id: str,
        headers: Mapping[str, str] | None = None,
        work: int = 0,
    ) -> None:
        """Submit ``arrays`` as a job, and report its events and its end to ``call``. Returns at once.

        ``work`` is what it costs, for the load that the stage reports.
        """
        opened = _Open(call, tuple(outputs), result, request_id)
        with self._lock:
            self._newest += 1
            number = self._newest
            self._open[number] = opened
            self._busy.set()

        def send() -> None:
            with self._lock:
                if number not in self._open:  # given up before its turn came
                    return
            if not call.alive():
                self._fail(number, StageUnavailable(f"{call.stage} died"))
                return
            message = Submit(self._owner, number, opened.outputs, self._doorbell_name, self._lock_name, work)
            try:
                exchange(self._call, message, [], arrays, request_id, headers)
            except Exception as error:
                self._fail(number, error)
            else:
                opened.submitted = True

        self._calls.put(send)

    def abort(self, request_id: str, alive: Callable[[], bool] = lambda: True) -> None:
        """Give up the tickets of a request and have the stage free its resources. Returns at once.

        A stage that is not ``alive`` holds nothing; to call it would hold up the calls behind.
        """
        with self._lock:
            for number in [number for number, opened in self._open.items() if opened.request_id == request_id]:
                del self._open[number]

        def send() -> None:
            if not alive():
                return
            try:
                self._call({"abort": _bytes_array(request_id.encode())}, [], request_id)
            except Exception as error:  # the stage's own time-outs free it later
                log.warning("request %s could not be aborted at a stage: %s", request_id, error)

        self._calls.put(send)

    def close(self, timeout_s: float) -> None:
        """Stop; waits up to ``timeout_s`` seconds for the calls that are queued, and fails what is still open."""
        self._closing.set()
        self._calls.put(None)
        self._busy.set()
        for thread in self._threads:
            thread.join(timeout_s)
        with self._lock:
            left = list(self._open)
        for number in left:
            self._fail(number, StageUnavailable("the stage's server was taken out"))
        if self._doorbell is not None:
            self._doorbell.close()

    def status_message(self) -> Status:
        """The message that makes the stage report the load of all its owners but this one."""
        return Status(self._owner)

    def _make_calls(self) -> None:
        while (call := self._calls.get()) is not None:
            call()

    def _keep_polling(self) -> None:
        while not self._closing.is_set():
            self._busy.wait()
            if self._doorbell is not None:
                self._doorbell.wait(WATCH_S)
            with self._lock:
                opened = dict(self._open)
                if not opened:
                    self._busy.clear()
                    continue
                newest = self._newest
            submitted = [number for number, one in opened.items() if one.submitted]
            wait_s = 0.0 if self._doorbell is not None else WATCH_S
            try:
                poll = Poll(self._owner, self._cursor, tuple(opened), newest, wait_s)
                answer, _ = exchange(self._call, poll)
                if answer.news is None:
                    raise Internal("a stage's answer to a poll has no news")
                self._take(answer.news, submitted)
            except Exception as error:
                if not isinstance(error, BagelError):
                    log.exception("a poll's answer could not be taken")
                reason = from_exception(error).message
                for number in submitted:
                    self._fail(number, StageUnavailable(f"{opened[number].call.stage} is unavailable: {reason}"))

    def _take(self, news: News, submitted: Sequence[int]) -> None:
        self._cursor = news.cursor
        for event in news.events:
            self._tell(event)
        lost = set(news.unknown).intersection(submitted)
        for number in lost:
            self._fail(number, StageUnavailable("the stage was started again"))

    def _tell(self, event: TicketEvent) -> None:
        with self._lock:
            opened = self._open.get(event.ticket)
        if opened is None:  # given up meanwhile
            return
        if isinstance(event, Progress):
            opened.call.progress(event.event)
        elif isinstance(event, Previewed):
            opened.call.progress(Preview(event.event, unpack(event.outputs)))
        elif isinstance(event, Failed):
            self._fail(event.ticket, from_text(event.error))
        elif event.outputs is not None:
            self._finish(event.ticket, unpack(event.outputs), event.stats)
        elif opened.stats is None:
            opened.stats = event.stats
            self._calls.put(lambda: self._fetch(event, opened))

    def _fetch(self, event: Finished, opened: _Open) -> None:
        try:
            message = Fetch(self._owner, event.ticket)
            _, arrays = exchange(self._call, message, opened.outputs, request_id=opened.request_id)
            self._finish(event.ticket, arrays, event.stats)
        except Exception as error:
            self._fail(event.ticket, error)

    def _finish(self, number: int, arrays: Arrays, stats: StageStats) -> None:
        with self._lock:
            opened = self._open.pop(number, None)
        if opened is None:
            return
        try:
            if missing := [name for name in opened.outputs if name not in arrays]:
                raise Internal(f"{opened.call.stage} answered without {', '.join(missing)}")
            opened.call.finish(opened.result(arrays), stats)
        except Exception as error:
            opened.call.fail(error)

    def _fail(self, number: int, error: Exception) -> None:
        with self._lock:
            opened = self._open.pop(number, None)
        if opened is not None:
            opened.call.fail(error)


def _bytes_array(data: bytes) -> Array:
    return np.array([data], dtype=np.object_)


class StageConnections:
    """``bagel``'s way to every stage, shared by all requests.

    Args:
        stages: this server's own, of those that do a request's work.
        bls: makes the unary call of a model of this server.
        announcement: this process; a stage drops its tickets when it has died.
        shm_prefix: the server's; its stages are announced under it.
        replicas: the servers of the stages that are not this server's, if there are any.
    """

    def __init__(
        self,
        stages: Collection[str],
        bls: Callable[[str], ModelCall],
        announcement: Announcement,
        shm_prefix: str,
        replicas: Replicas | None,
    ) -> None:
        self._prefix, self.replicas, self._bls = shm_prefix, replicas, bls
        self.expand_call = bls(EXPANDER)
        self._expanding = ThreadPoolExecutor(EXPANDER_CALLS, "cfg_expand-calls")
        # One at a time, so an instance is always free for a request whose images are soon decoded.
        self._expanding_heavy = ThreadPoolExecutor(1, "cfg_expand-heavy")
        self.stages = {
            stage: TicketClient(bls(stage), Doorbell(self._prefix), announcement.lock_name)
            for stage in (THINKER, DIT, DECODER)
            if stage in stages
        }

    def stage_calls(self, reachable: bool = False) -> dict[str, ModelCall]:
        """The call of every stage there is now, by its name; with its address where it is elsewhere.

        With ``reachable`` servers that are down are left out, unless all are.
        """
        calls = {str(stage): self._bls(stage) for stage in self.stages}
        return calls if self.replicas is None else calls | self.replicas.stage_calls(reachable)

    def watch(self, stage: str) -> Callable[[], bool]:
        """Whether ``stage`` of this server has lived on since this call, when called."""
        return liveness.watch(self._prefix, stage)

    def is_alive(self, stage: str) -> bool:
        """Whether ``stage`` of this server can be called."""
        return self.watch(stage)()

    def expander_pool(self, request: Arrays) -> ThreadPoolExecutor:
        """The threads that call ``cfg_expand`` for ``request``."""
        images = request["image"].reshape(-1).tolist() if "image" in request else ()
        return self._expanding_heavy if is_heavy(images) else self._expanding

    def close(self, timeout_s: float) -> None:
        """Stop; aborts that are queued get up to ``timeout_s`` seconds a stage."""
        for pool in (self._expanding, self._expanding_heavy):
            pool.shutdown(wait=False, cancel_futures=True)
        for client in self.stages.values():
            client.close(timeout_s)
        if self.replicas is not None:
            self.replicas.close(timeout_s)


class TritonStages:
    """The stages for one request; ``headers`` hold its trace context.

    Where stage 1 has servers of its own, the request stays with the one that denoises it.
    """

    def __init__(self, connections: StageConnections, request_id: str, headers: Mapping[str, str]) -> None:
        self._connections, self._request_id, self._headers = connections, request_id, headers
        self._replica: Replica | None = None
        self._assignment: Assignment | None = None
        self._failed: tuple[Replica, ...] = ()

    def expand(self, request: Arrays) -> StageCall[Plan]:
        """``cfg_expand``, with the client's own tensors."""
        call: StageCall[Plan] = StageCall(EXPANDER, self._connections.watch(EXPANDER))

        def run() -> None:
            if call.given_up:  # while it was queued: to decode its images would only hold up others
                return
            try:
                arrays = self._connections.expand_call(request, ["plan", "stats"], self._request_id)
                call.finish(decode(_bytes(arrays["plan"]), Plan), decode_stats(_bytes(arrays["stats"])))
            except Exception as error:
                call.fail(error)

        self._connections.expander_pool(request).submit(run)
        return call

    def think(self, plan: Plan) -> StageCall[ThinkerOutput]:
        """``thinker``, with text as it is decoded."""

        def result(arrays: Arrays) -> ThinkerOutput:
            return decode(_bytes(arrays["thinker_output"]), ThinkerOutput)

        return self._submit(THINKER, {"plan": _message(plan)}, ["thinker_output"], result, plan.request_id)

    def denoise(self, job: DenoiseJob) -> StageCall[list[Arrays]]:
        """``dit``, with progress."""
        outputs, inputs = ["latents", "latent_grid"], {"denoise_job": _message(job)}
        return self._submit(DIT, inputs, outputs, _split_latents, job.request_id, denoising_work(job.flow))

    def decode(self, latents: Arrays, request_id: str, scheduling: SchedulingParams) -> StageCall[Array]:
        """``vae_decode``."""
        name, inputs = "generated_image", {**latents, "scheduling": _message(scheduling)}
        return self._submit(DECODER, inputs, [name], lambda arrays: arrays[name], request_id)

    def elsewhere(self) -> bool:
        """Give the server up that failed; whether another takes the request, which is tried once."""
        replicas, failed = self._connections.replicas, self._replica
        if replicas is None or failed is None or self._failed:
            return False
        self._failed = (failed,)
        self._give_back()
        self._replica = None
        if not replicas.balancer.has_other((failed.address,)):
            return False
        replicas.retried()
        return True

    def abort(self, request_id: str) -> None:
        """Stop the request's work in every stage and revoke its leases."""
        for stage, client in self._connections.stages.items():
            client.abort(request_id, partial(self._connections.is_alive, stage))
        self._give_back()
        for replica in (*self._failed, *([] if self._replica is None else [self._replica])):
            for model, client in replica.clients.items():
                client.abort(request_id, partial(replica.server.is_ready, model))

    def _submit(
        self,
        stage: Stage,
        inputs: Arrays,
        outputs: Sequence[str],
        result: Callable[[Arrays], Any],
        request_id: str,
        work: int = 0,
    ) -> StageCall[Any]:
        assignment: Assignment | None = None
        if stage in self._connections.stages:
            client, alive = self._connections.stages[stage], self._connections.watch(stage)
        else:
            replica, assignment = self._replica_for(work)
            client, alive = replica.clients[stage], replica.server.watch(stage)
        call: StageCall[Any] = StageCall(stage, alive)
        if assignment is not None:
            call.done.add_done_callback(lambda _: self._give_back())
        client.submit(call, inputs, outputs, result, request_id, self._headers, work)
        return call

    def _replica_for(self, work: int) -> tuple[Replica, Assignment | None]:
        """The server of the request, and what it is assigned now: for denoising, or in place of one that is gone."""
        replicas = self._connections.replicas
        assert replicas is not None, "every stage is this server's"
        if self._replica is not None and not work and replicas.balancer.state(self._replica.address) != "down":
            return self._replica, None
        self._give_back()
        avoid = [replica.address for replica in self._failed]
        self._replica, self._assignment = replicas.take(work, avoid)
        return self._replica, self._assignment

    def _give_back(self) -> None:
        replicas, assignment = self._connections.replicas, self._assignment
        if replicas is not None and assignment is not None:
            replicas.balancer.give_back(assignment)


def denoising_work(flow: FlowSettings) -> int:
    """The cost of a request's images, in latent tokens times steps."""
    tokens = (flow.height // LATENT_STRIDE) * (flow.width // LATENT_STRIDE)
    return max(1, tokens * flow.num_inference_steps * flow.num_images)


def _bytes(array: Array) -> bytes:
    return bytes(array.reshape(-1)[0])


def _message(message: Message) -> Array:
    return np.array([encode(message)], dtype=np.object_)


def _split_latents(arrays: Arrays) -> list[Arrays]:
    """The latents of each image: they come stacked, [images * tokens, channels]."""
    rows, columns = arrays["latent_grid"].tolist()
    latents = arrays["latents"]
    parts = np.split(latents, len(latents) // (rows * columns))
    return [{"latents": part, "latent_grid": arrays["latent_grid"]} for part in parts]
