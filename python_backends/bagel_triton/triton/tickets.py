"""Tickets: a stage works for ``bagel`` without any call of the stage that waits for the work.

``bagel`` submits a job under a ticket, polls for everything that happened to its tickets,
and fetches results that are too large for a poll. ``execute`` answers each of these calls at
once. Triton notices a dead stub only while ``execute`` runs, so a call of a dead stage fails
within about a second, and no call is ever left waiting for a stage that will not answer.

This module has the messages of both sides and the stage's side, :class:`TicketStore`. The
caller's side is :mod:`bagel_triton.triton.stages`. Neither knows Triton's objects.
"""

from __future__ import annotations

import itertools
import logging
import secrets
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec
import numpy as np

from bagel_triton.ipc.shm import SHM_DIRECTORY
from bagel_triton.protocol.errors import BagelError, Internal, InvalidRequest, StageUnavailable, from_exception
from bagel_triton.protocol.events import Event, PartialImageEvent, Preview, StageStats
from bagel_triton.protocol.intervals import WATCH_S
from bagel_triton.protocol.messages import Message, SchedulingParams, encode
from bagel_triton.protocol.tensors import Array, Arrays

OWNER_SILENCE_S = 10.0  # an owner that has not polled for so long has given its tickets up
INLINE_BYTES = 16 << 10  # a larger result waits for a fetch, which Triton carries in shared memory
log = logging.getLogger(__name__)


class PackedTensor(Message, frozen=True):
    """An array inside a message; ``dtype`` is NumPy's name, or "bytes" for a BYTES [1] tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: bytes


class Submit(Message, frozen=True, tag="submit"):
    """Start the job in the request's other inputs; its result will be ``outputs``.

    ``owner`` is the caller's random name and ``ticket`` a number that it counts up.
    ``doorbell`` names the caller's abstract Unix datagram socket, ``lock`` the file in shared
    memory that the caller holds locked as long as it lives. A caller on another host has neither.
    ``work`` is what the job costs, in the caller's own unit, for :class:`StageStatus`.
    """

    owner: str
    ticket: int
    outputs: tuple[str, ...]
    doorbell: str | None = None
    lock: str | None = None
    work: int = 0


class Poll(Message, frozen=True, tag="poll"):
    """Report what happened after ``cursor``, which acknowledges everything before it.

    ``tickets`` are all that the owner still has; others up to ``newest`` are aborted. Without
    news the answer may take ``wait_s``, which only a caller on another host asks for.
    """

    owner: str
    cursor: str
    tickets: tuple[int, ...]
    newest: int
    wait_s: float = 0.0


class Fetch(Message, frozen=True, tag="fetch"):
    """Answer with the result's tensors, once."""

    owner: str
    ticket: int


class Status(Message, frozen=True, tag="status"):
    """Report the stage's load and whether it drains; ``owner`` is the caller."""

    owner: str = ""


class Drain(Message, frozen=True, tag="drain"):
    """Refuse new jobs from now on, and finish those that are there; with ``on`` false, take jobs again."""

    on: bool


class Sleep(Message, frozen=True, tag="sleep"):
    """Begin to sleep at ``level``, or to wake with 0; :class:`StageStatus` says when it is done."""

    level: int


class Adapt(Message, frozen=True, tag="adapt"):
    """Begin to load the adapter ``name`` from ``path``, or to let go of it where that is empty, likewise."""

    name: str
    path: str = ""


class TicketCall(Message, frozen=True):
    """The input ``ticket`` of a stage; the answer repeats ``token``."""

    token: int
    call: Submit | Poll | Fetch | Status | Drain | Sleep | Adapt


class Progress(Message, frozen=True, tag="progress"):
    """An engine's event."""

    ticket: int
    event: Event


class Previewed(Message, frozen=True, tag="previewed"):
    """A preview: ``outputs`` has the form of a result of one image."""

    ticket: int
    event: PartialImageEvent
    outputs: tuple[PackedTensor, ...]


class Failed(Message, frozen=True, tag="failed"):
    """The job failed; ``error`` is the text form of a :class:`BagelError`."""

    ticket: int
    error: str


class Finished(Message, frozen=True, tag="finished"):
    """The job is done; without ``outputs``, they have to be fetched."""

    ticket: int
    stats: StageStats
    outputs: tuple[PackedTensor, ...] | None


TicketEvent = Progress | Previewed | Failed | Finished


class News(Message, frozen=True):
    """A poll's answer: events in order, and which of the owner's tickets the stage does not have."""

    cursor: str
    events: tuple[TicketEvent, ...] = ()
    unknown: tuple[int, ...] = ()


class StageStatus(Message, frozen=True):
    """A stage's load: jobs whose result has not been taken, and the work of all owners but the one that asks.

    ``asleep`` is the level of its sleep, ``changing`` whether that or its ``adapters`` are about to change, and
    ``failure`` the text form of the error that the last change ended with.
    """

    draining: bool
    jobs: int
    work_of_others: int
    asleep: int = 0
    changing: bool = False
    failure: str = ""
    adapters: tuple[str, ...] = ()


class TicketAnswer(Message, frozen=True):
    """The output ``ticket`` of a stage."""

    token: int
    news: News | None = None
    status: StageStatus | None = None


def pack(arrays: Arrays) -> tuple[PackedTensor, ...]:
    """``arrays`` for a message."""
    return tuple(_pack(name, array) for name, array in arrays.items())


def _pack(name: str, array: Array) -> PackedTensor:
    if array.dtype == np.object_:
        return PackedTensor(name, "bytes", array.shape, bytes(array.reshape(-1)[0]))
    return PackedTensor(name, array.dtype.name, array.shape, array.tobytes())


def unpack(tensors: tuple[PackedTensor, ...]) -> Arrays:
    """The arrays that :func:`pack` packed."""
    return {tensor.name: _unpack(tensor) for tensor in tensors}


def _unpack(tensor: PackedTensor) -> Array:
    if tensor.dtype == "bytes":
        return np.array([tensor.data], dtype=np.object_)
    return np.frombuffer(tensor.data, tensor.dtype).reshape(tensor.shape)


def _size(arrays: Arrays) -> int:
    return sum(len(array.reshape(-1)[0]) if array.dtype == np.object_ else array.nbytes for array in arrays.values())


class RunningJob(Protocol):
    """The store's view of an engine's job."""

    done: Future[tuple[Any, StageStats]]


@dataclass(frozen=True)
class Work:
    """A request to an engine, taken from a stage's inputs; ``outputs`` turns its result into tensors."""

    task: Any
    request_id: str
    outputs: Callable[[Any], Arrays]
    scheduling: SchedulingParams = field(default_factory=SchedulingParams)


@dataclass(eq=False)
class _Ticket:
    work: int = 0
    job: RunningJob | None = None  # None until the engine has it, or if it was refused
    result: Arrays | None = None

    @property
    def open(self) -> bool:
        """Whether there is work or a result left."""
        return self.result is not None or (self.job is not None and not self.job.done.done())


@dataclass(eq=False)
class _Owner:
    doorbell: str | None
    lock: str | None
    heard_at: float
    rung: bool = False
    tickets: dict[int, _Ticket] = field(default_factory=dict)
    events: deque[tuple[int, TicketEvent]] = field(default_factory=deque)
    waiting: _WaitingPoll | None = None


@dataclass(eq=False)
class _WaitingPoll:
    answer: Callable[[News], None]
    until: float


class TicketStore:
    """The tickets of the stage ``model``, by owner; every method is safe from any thread.

    ``abort`` makes the engine drop a job. ``alive`` says whether the owner's lock is held.
    A doorbell is rung only where its name starts with ``prefix``, the server's own.
    """

    def __init__(self, abort: Callable[[Any], None], alive: Callable[[str], bool], prefix: str, model: str) -> None:
        self._abort, self._alive, self._prefix = abort, alive, prefix
        self._session = secrets.token_hex(4)  # cursors of a process before this one mean nothing
        self._numbers = itertools.count(1)
        self._owners: dict[str, _Owner] = {}
        # A file, as a stage's process that is started again goes on draining.
        self._draining = SHM_DIRECTORY / f"{prefix}_{model}_draining"
        self._lock = threading.RLock()
        self._bell = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._closing, self._changed = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="ticket-expiry", daemon=True)
        self._thread.start()

    def submit(self, message: Submit, start: Callable[[Callable[[Any], None]], tuple[Work, RunningJob]]) -> None:
        """Open a ticket and ``start`` its job, which reports progress to the callable it is given.

        Whatever is wrong with the job becomes an event of the ticket.
        """
        ticket = _Ticket(message.work)
        with self._lock:
            owner = self._owner(message.owner, message.doorbell, message.lock)
            if message.ticket in owner.tickets:
                raise InvalidRequest(f"ticket {message.ticket} is in use", "ticket")
            owner.tickets[message.ticket] = ticket
        self._changed.set()

        def tell(event: TicketEvent, result: Arrays | None = None) -> None:
            with self._lock:
                if owner.tickets.get(message.ticket) is ticket:  # else it was given up meanwhile
                    ticket.result = result
                    self._tell(owner, event)

        def report(event: Event | Preview[Arrays]) -> None:
            if isinstance(event, Preview):
                outputs = {name: array for name, array in event.latents.items() if name in message.outputs}
                tell(Previewed(message.ticket, event.event, pack(outputs)))
            else:
                tell(Progress(message.ticket, event))

        try:
            if self._draining.exists():
                raise StageUnavailable("the stage drains and takes no more jobs")
            work, job = start(report)
        except Exception as error:
            tell(Failed(message.ticket, _text(error)))
            return
        with self._lock:
            ticket.job = job
            given_up = owner.tickets.get(message.ticket) is not ticket
        if given_up:
            self._abort(job)

        def finish(done: Future[tuple[Any, StageStats]]) -> None:
            try:
                result, stats = done.result()
                arrays = {name: array for name, array in work.outputs(result).items() if name in message.outputs}
                if _size(arrays) <= INLINE_BYTES:
                    tell(Finished(message.ticket, stats, pack(arrays)))
                else:
                    tell(Finished(message.ticket, stats, None), arrays)
            except Exception as error:
                tell(Failed(message.ticket, _text(error)))

        job.done.add_done_callback(finish)

    def poll(self, message: Poll, answer: Callable[[News], None]) -> None:
        """Call ``answer`` with the news: at once if there are any or the poll does not wait, else from any thread."""
        with self._lock:
            owner = self._owner(message.owner)
            session, _, number = message.cursor.partition(":")
            if session == self._session:
                while owner.events and owner.events[0][0] <= int(number):
                    owner.events.popleft()
            kept = set(message.tickets)
            closed = [number for number in owner.tickets if number <= message.newest and number not in kept]
            given_up = [owner.tickets.pop(number).job for number in closed]
            if closed:
                owner.events = deque(item for item in owner.events if item[1].ticket in owner.tickets)
            owner.rung = False
            unknown = tuple(number for number in message.tickets if number not in owner.tickets)
            if owner.waiting is not None:
                owner.waiting.answer(News(message.cursor))
                owner.waiting = None
            if message.wait_s and not owner.events and not unknown:
                owner.waiting = _WaitingPoll(answer, time.monotonic() + message.wait_s)
            else:
                answer(self._news(owner, unknown))
        self._changed.set()
        self._give_up([job for job in given_up if job is not None and not job.done.done()])

    def fetch(self, message: Fetch) -> Arrays:
        """A result's tensors.

        Raises:
            StageUnavailable: the ticket has no result here.
        """
        with self._lock:
            ticket = self._owner(message.owner).tickets.get(message.ticket)
            if ticket is None or ticket.result is None:
                raise StageUnavailable(f"the result of ticket {message.ticket} is not there any more")
            # The ticket stays until a poll leaves it out: until then the owner may still name it.
            result, ticket.result = ticket.result, None
            return result

    def drain(self, on: bool) -> None:
        """Refuse new jobs, or take them again."""
        if on:
            self._draining.touch()
        else:
            self._draining.unlink(missing_ok=True)

    def status(self, message: Status) -> StageStatus:
        """The stage's load."""
        with self._lock:
            opened = [
                (name, ticket)
                for name, owner in self._owners.items()
                for ticket in owner.tickets.values()
                if ticket.open
            ]
        others = sum(ticket.work for name, ticket in opened if name != message.owner)
        return StageStatus(self._draining.exists(), len(opened), others)

    def close(self) -> None:
        """Stop; jobs are the engine's to end."""
        self._closing.set()
        self._changed.set()
        self._thread.join()
        self._bell.close()

    def _owner(self, name: str, doorbell: str | None = None, lock: str | None = None) -> _Owner:
        owner = self._owners.setdefault(name, _Owner(doorbell, lock, 0.0))
        owner.heard_at = time.monotonic()
        if doorbell is not None or lock is not None:
            owner.doorbell, owner.lock = doorbell, lock
        return owner

    def _tell(self, owner: _Owner, event: TicketEvent) -> None:
        owner.events.append((next(self._numbers), event))
        if (waiting := owner.waiting) is not None:
            owner.waiting = None
            waiting.answer(self._news(owner))
        elif owner.doorbell is not None and not owner.rung and owner.doorbell.startswith(self._prefix):
            owner.rung = True
            try:
                self._bell.sendto(b"\1", f"\0{owner.doorbell}")
            except OSError:  # a hint only: the owner polls all the same
                owner.rung = False

    def _news(self, owner: _Owner, unknown: tuple[int, ...] = ()) -> News:
        last = owner.events[-1][0] if owner.events else 0
        return News(f"{self._session}:{last}", tuple(event for _, event in owner.events), unknown)

    def _run(self) -> None:
        while not self._closing.is_set():
            self._changed.wait(WATCH_S if self._owners else None)
            self._changed.clear()
            self._closing.wait(WATCH_S)
            self._expire(time.monotonic())

    def _expire(self, now: float) -> None:
        """Answer polls that waited long enough, and drop owners that died or fell silent."""
        with self._lock:
            for owner in self._owners.values():
                if owner.waiting is not None and now >= owner.waiting.until:
                    waiting, owner.waiting = owner.waiting, None
                    owner.heard_at = now
                    waiting.answer(self._news(owner))
            gone = [name for name, owner in self._owners.items() if self._is_gone(owner, now)]
            jobs = [ticket.job for name in gone for ticket in self._owners.pop(name).tickets.values()]
        self._give_up([job for job in jobs if job is not None])

    def _is_gone(self, owner: _Owner, now: float) -> bool:
        if owner.lock is not None and not self._alive(owner.lock):
            return True
        return now - owner.heard_at > OWNER_SILENCE_S

    def _give_up(self, jobs: list[RunningJob]) -> None:
        for job in jobs:
            self._abort(job)


def _text(error: Exception) -> str:
    if not isinstance(error, BagelError):
        log.error("a job failed", exc_info=error)
    return from_exception(error).to_text()


def decode_call(data: bytes) -> TicketCall:
    """The call in the input ``ticket``.

    Raises:
        InvalidRequest: it is none.
    """
    try:
        return msgspec.msgpack.decode(data, type=TicketCall)
    except msgspec.DecodeError as error:
        raise InvalidRequest(f"input ticket is not a TicketCall: {error}", "ticket") from error


def exchange(
    call: Callable[..., Arrays],
    message: Submit | Poll | Fetch | Status | Drain | Sleep | Adapt,
    outputs: Sequence[str] = (),
    arrays: Arrays | None = None,
    request_id: str = "",
    headers: Mapping[str, str] | None = None,
) -> tuple[TicketAnswer, Arrays]:
    """One ticket call of a stage by ``call``; its answer and the outputs beside it.

    Raises:
        BagelError: the call failed, or its answer belongs to another call.
    """
    token = secrets.randbits(62)
    ticket = {"ticket": np.array([encode(TicketCall(token, message))], dtype=np.object_)}
    answered = call({**(arrays or {}), **ticket}, ["ticket", *outputs], request_id, headers)
    try:
        answer = msgspec.msgpack.decode(bytes(answered.pop("ticket").reshape(-1)[0]), type=TicketAnswer)
    except (KeyError, IndexError, msgspec.DecodeError) as error:
        raise Internal(f"a stage's answer has no ticket: {error}") from error
    if answer.token != token:
        raise Internal("a stage's answer belongs to another call")
    return answer, answered
