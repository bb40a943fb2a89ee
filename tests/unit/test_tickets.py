"""Tickets: the caller's side and the stage's side together, without Triton."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
import pytest

from bagel_triton.pipeline.pipeline import StageCall
from bagel_triton.protocol.errors import BagelError, Internal, InvalidRequest, StageUnavailable
from bagel_triton.protocol.events import Event, PartialImageEvent, Preview, ProgressEvent, StageStats
from bagel_triton.protocol.messages import encode
from bagel_triton.protocol.tensors import Arrays
from bagel_triton.triton import tickets
from bagel_triton.triton.stages import Doorbell, TicketClient
from bagel_triton.triton.tickets import (
    Fetch,
    Finished,
    News,
    Poll,
    Progress,
    StageStatus,
    Status,
    Submit,
    TicketAnswer,
    TicketStore,
    Work,
    decode_call,
    exchange,
)
from tests.support.waiting import soon

STATS = StageStats("dit", 0.0, 1.0)
SMALL, LARGE = np.arange(3, dtype=np.float32), np.arange(50_000, dtype=np.float32)
PREFIX = "bagel_triton_test"


@dataclass(eq=False)
class FakeJob:
    progress: Callable[[Any], None]
    done: Future[tuple[Any, StageStats]] = field(default_factory=Future)

    def step(self, number: int) -> None:
        self.progress(ProgressEvent("dit", number, 9))

    def finish(self, result: np.ndarray = SMALL) -> None:
        self.done.set_result((result, STATS))


class FakeStage:
    """A stage's model: its store, and the jobs that were submitted. ``broken`` is how its calls fail."""

    def __init__(self) -> None:
        self.jobs: list[FakeJob] = []
        self.aborted: list[FakeJob] = []
        self.aborted_requests: list[str] = []
        self.calls: list[str] = []
        self.refuse: BagelError | None = None
        self.broken: BagelError | None = None
        self.wrong_token = False
        self.locks = {"lock"}
        self.rings = PREFIX
        self.restart()

    def restart(self) -> None:
        self.store = TicketStore(self.aborted.append, lambda name: name in self.locks, self.rings, "dit")

    def start(self, progress: Callable[[Any], None]) -> tuple[Work, FakeJob]:
        if self.refuse is not None:
            raise self.refuse
        self.jobs.append(FakeJob(progress))
        return Work(None, "r", lambda result: {"out": result, "seed": np.array([7])}), self.jobs[-1]

    def __call__(
        self, arrays: Arrays, outputs: Sequence[str], request_id: str, headers: Mapping[str, str] | None = None
    ) -> Arrays:
        if self.broken is not None:
            raise self.broken
        if "abort" in arrays:
            self.aborted_requests.append(arrays["abort"][0].decode())
            return {}
        called = decode_call(arrays["ticket"][0])
        self.calls.append(type(called.call).__name__)
        answer, result = TicketAnswer(called.token + self.wrong_token), {}
        if isinstance(called.call, Submit):
            self.store.submit(called.call, self.start)
        elif isinstance(called.call, Fetch):
            result = self.store.fetch(called.call)
        elif isinstance(called.call, Status):
            answer = msgspec.structs.replace(answer, status=self.store.status(called.call))
        else:
            told: Future[News] = Future()
            self.store.poll(called.call, told.set_result)
            answer = msgspec.structs.replace(answer, news=told.result(5))
        return {"ticket": np.array([encode(answer)], dtype=np.object_), **result}


@pytest.fixture
def stage() -> Iterator[FakeStage]:
    stage = FakeStage()
    yield stage
    stage.store.close()


@pytest.fixture(params=["doorbell", "waiting poll"])
def client(stage: FakeStage, request: pytest.FixtureRequest) -> Iterator[TicketClient]:
    here = (Doorbell(PREFIX), "lock") if request.param == "doorbell" else ()
    client = TicketClient(stage, *here)
    yield client
    client.close(5)


class Following:
    """What one call of the stage is told."""

    def __init__(self, client: TicketClient, request_id: str = "r", alive: bool = True) -> None:
        self.events: list[Event | Preview[Arrays]] = []
        self.result: Any = None
        call: StageCall[Any] = StageCall("dit", lambda: alive)
        client.submit(call, {"x": SMALL}, ["out"], lambda arrays: arrays["out"], request_id)
        self.thread = threading.Thread(target=self._follow, args=(call,))
        self.thread.start()

    def _follow(self, call: StageCall[Any]) -> None:
        following = call.follow(lambda: False, 5)
        try:
            while True:
                self.events.append(next(following))
        except StopIteration as stop:
            self.result = stop.value
        except BagelError as error:
            self.result = error

    def end(self) -> Any:
        self.thread.join(10)
        assert not self.thread.is_alive()
        return self.result


def submitted(stage: FakeStage, client: TicketClient, count: int = 1) -> list[Following]:
    following = [Following(client, f"r{number}") for number in range(count)]
    assert soon(lambda: len(stage.jobs) == count)
    return following


@pytest.mark.parametrize("result", [SMALL, LARGE], ids=["in the poll", "fetched"])
def test_events_come_in_order_and_the_result_last(stage: FakeStage, client: TicketClient, result: np.ndarray) -> None:
    [following] = submitted(stage, client)
    for number in range(1, 6):
        stage.jobs[0].step(number)
    stage.jobs[0].finish(result)
    array, stats = following.end()
    assert [event.step for event in following.events if isinstance(event, ProgressEvent)] == [1, 2, 3, 4, 5]
    assert (array == result).all()
    assert array.dtype == result.dtype
    assert stats == STATS
    assert ("Fetch" in stage.calls) == (result is LARGE)


def test_a_preview_comes_with_the_tensors_that_the_caller_wants(stage: FakeStage, client: TicketClient) -> None:
    [following] = submitted(stage, client)
    event = PartialImageEvent(0, 1, 3, 9, 32, 32)
    stage.jobs[0].step(3)
    stage.jobs[0].progress(Preview(event, {"out": LARGE, "seed": np.array([7])}))
    stage.jobs[0].finish()
    following.end()
    _, preview = following.events
    assert isinstance(preview, Preview)
    assert preview.event == event
    assert preview.latents.keys() == {"out"}
    assert (preview.latents["out"] == LARGE).all()


def test_each_request_gets_its_own_result(stage: FakeStage, client: TicketClient) -> None:
    following = submitted(stage, client, 20)
    for number, job in reversed(list(enumerate(stage.jobs))):
        job.finish(np.array([number]))
    assert [one.end()[0].item() for one in following] == list(range(20))


def test_a_jobs_error_arrives_with_its_type(stage: FakeStage, client: TicketClient) -> None:
    [following] = submitted(stage, client)
    stage.jobs[0].step(1)
    stage.jobs[0].done.set_exception(InvalidRequest("no such seed", "seed"))
    error = following.end()
    assert isinstance(error, InvalidRequest)
    assert (error.param, error.message) == ("seed", "no such seed")
    assert len(following.events) == 1, "an error must not overtake what came before it"


def test_a_job_that_is_refused_at_once_fails_its_request(stage: FakeStage, client: TicketClient) -> None:
    stage.refuse = InvalidRequest("not a plan", "plan")
    assert isinstance(Following(client).end(), InvalidRequest)


def test_a_stage_that_cannot_be_called_fails_its_requests_and_no_later_ones(
    stage: FakeStage, client: TicketClient
) -> None:
    following = submitted(stage, client, 3)
    stage.broken = StageUnavailable("Stub process 'dit_0_0' is not healthy.")
    assert all(isinstance(one.end(), StageUnavailable) for one in following)
    assert isinstance(Following(client).end(), StageUnavailable)
    stage.broken = None
    later = Following(client)
    assert soon(lambda: len(stage.jobs) == 4)
    stage.jobs[3].finish()
    assert (later.end()[0] == SMALL).all()


def test_a_dead_stage_is_not_called(stage: FakeStage, client: TicketClient) -> None:
    assert isinstance(Following(client, alive=False).end(), StageUnavailable)
    assert not stage.jobs


def test_a_stage_that_was_started_again_has_lost_its_tickets(stage: FakeStage, client: TicketClient) -> None:
    [following] = submitted(stage, client)
    stage.store.close()
    stage.restart()
    assert isinstance(following.end(), StageUnavailable)


def test_an_answer_of_another_call_is_not_taken(stage: FakeStage, client: TicketClient) -> None:
    stage.wrong_token = True
    error = Following(client).end()
    assert isinstance(error, Internal)
    assert "belongs to another call" in error.message


def test_an_aborted_request_ends_at_the_stage(stage: FakeStage, client: TicketClient) -> None:
    submitted(stage, client, 2)[0].thread.join(0)
    client.abort("r0")
    assert soon(lambda: stage.aborted_requests == ["r0"])
    assert soon(lambda: stage.aborted == stage.jobs[:1]), "the next poll leaves its ticket out"
    for job in stage.jobs:
        job.done.set_exception(StageUnavailable("over"))


def test_nothing_is_polled_while_there_is_nothing_to_hear(stage: FakeStage, client: TicketClient) -> None:
    [following] = submitted(stage, client)
    stage.jobs[0].finish()
    following.end()
    time.sleep(2 * tickets.WATCH_S)
    polls = stage.calls.count("Poll")
    time.sleep(4 * tickets.WATCH_S)
    assert stage.calls.count("Poll") == polls


def test_a_bell_that_is_lost_costs_only_time(stage: FakeStage) -> None:
    stage.store.close()
    stage.rings = "another server"  # whose sockets it may ring, and no others
    stage.restart()
    client = TicketClient(stage, Doorbell(PREFIX), "lock")
    [following] = submitted(stage, client)
    stage.jobs[0].finish()
    assert (following.end()[0] == SMALL).all()
    client.close(5)


# --- the stage's side alone: owners that die or fall silent, answers that are lost ---


def submit(stage: FakeStage, ticket: int = 1, lock: str | None = "lock") -> FakeJob:
    stage.store.submit(Submit("me", ticket, ("out",), None, lock), stage.start)
    return stage.jobs[-1]


def poll(stage: FakeStage, cursor: str = "", open_tickets: tuple[int, ...] = (1,), newest: int = 1) -> News:
    told: list[News] = []
    stage.store.poll(Poll("me", cursor, open_tickets, newest), told.append)
    return told[0]


def test_events_are_repeated_until_a_poll_acknowledges_them(stage: FakeStage) -> None:
    job = submit(stage)
    job.step(1)
    first = poll(stage)
    assert [type(event) for event in first.events] == [Progress]
    assert poll(stage).events == first.events, "the first answer may have been lost"
    job.finish()
    assert [type(event) for event in poll(stage, first.cursor).events] == [Finished]


def test_a_cursor_of_an_earlier_process_acknowledges_nothing(stage: FakeStage) -> None:
    submit(stage).step(1)
    assert len(poll(stage, "0ldc0de5:99").events) == 1


def test_a_ticket_that_the_stage_does_not_have_is_named(stage: FakeStage) -> None:
    submit(stage)
    assert poll(stage, "", (1, 2), 2).unknown == (2,)


def test_a_ticket_that_a_poll_leaves_out_is_aborted_but_no_newer_one(stage: FakeStage) -> None:
    given_up, newer = submit(stage, 1), submit(stage, 2)
    poll(stage, "", (), 1)
    assert stage.aborted == [given_up]
    newer.step(1)
    assert [event.ticket for event in poll(stage, "", (2,), 2).events] == [2]


def test_a_finished_job_is_not_aborted(stage: FakeStage) -> None:
    submit(stage).finish()
    poll(stage, "", (), 1)
    assert stage.aborted == [], "that would revoke leases that the next stage is about to claim"


def test_a_result_is_given_once(stage: FakeStage) -> None:
    submit(stage).finish(LARGE)
    assert (stage.store.fetch(Fetch("me", 1))["out"] == LARGE).all()
    with pytest.raises(StageUnavailable, match="not there any more"):
        stage.store.fetch(Fetch("me", 1))


def test_jobs_of_an_owner_that_died_are_aborted(stage: FakeStage) -> None:
    job = submit(stage)
    stage.locks.clear()
    assert soon(lambda: stage.aborted == [job])


def test_jobs_of_an_owner_that_fell_silent_are_aborted(stage: FakeStage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tickets, "OWNER_SILENCE_S", 0.5)
    job = submit(stage, lock=None)
    assert soon(lambda: stage.aborted == [job])


def test_a_message_that_is_no_ticket_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="not a TicketCall"):
        decode_call(b"\x81\xa5token\x01")


def test_a_stage_that_drains_finishes_its_jobs_and_refuses_others(stage: FakeStage, client: TicketClient) -> None:
    [following] = submitted(stage, client)
    stage.store.drain(True)
    refused = Following(client).end()
    assert isinstance(refused, StageUnavailable)
    assert "drains" in refused.message
    assert stage.store.status(Status()) == StageStatus(True, 1, 0)
    stage.jobs[0].finish(LARGE)
    following.end()
    assert stage.store.status(Status()).jobs == 0  # the result was taken
    stage.store.close()
    stage.restart()
    assert stage.store.status(Status()).draining
    stage.store.drain(False)
    later = Following(client)
    assert soon(lambda: len(stage.jobs) == 2)
    stage.jobs[1].finish()
    assert (later.end()[0] == SMALL).all()


def test_a_stage_reports_the_work_of_other_callers(stage: FakeStage, client: TicketClient) -> None:
    other = TicketClient(stage)
    for each, work in ((client, 100), (other, 7)):
        each.submit(StageCall("dit"), {"x": SMALL}, ["out"], lambda arrays: arrays, "r", work=work)
    assert soon(lambda: len(stage.jobs) == 2)
    status, _ = exchange(stage, client.status_message())
    assert status.status == StageStatus(False, 2, 7)
    other.close(5)


def test_a_client_that_is_closed_fails_what_it_waits_for(stage: FakeStage) -> None:
    client = TicketClient(stage)
    [following] = submitted(stage, client)
    client.close(5)
    assert isinstance(following.end(), StageUnavailable)
