"""The loop all engines share: jobs join, wait, leave, fail and are aborted without disturbing each other."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from unittest.mock import Mock

import pytest
import torch

from bagel_triton.protocol.errors import (
    BagelError,
    Cancelled,
    DeadlineExceeded,
    Internal,
    InvalidRequest,
    LeaseError,
    Overloaded,
    StageUnavailable,
)
from bagel_triton.protocol.events import ProgressEvent
from bagel_triton.protocol.intervals import LEASE_RENEWAL_S
from bagel_triton.protocol.messages import SchedulingParams
from tests.support.counting_engine import WAIT_S, Count, CountingEngine, CountJob, error_of, submit
from tests.support.waiting import soon


@pytest.fixture
def engine() -> Iterator[CountingEngine]:
    engine = CountingEngine()
    yield engine
    engine.free_run()
    engine.close()


def test_jobs_finish_in_the_order_of_their_length_not_of_their_coming(engine: CountingEngine) -> None:
    finished: list[str] = []
    jobs = []
    for name, steps in (("long", 9), ("short", 2), ("middle", 5)):
        job = submit(engine, name, Count(steps))
        job.done.add_done_callback(lambda _, name=name: finished.append(name))
        jobs.append(job)
    engine.free_run()
    assert [job.done.result(WAIT_S)[0] for job in jobs] == [9, 2, 5]
    assert finished == ["short", "middle", "long"]


def test_a_job_joins_between_the_steps_of_another(engine: CountingEngine) -> None:
    first = submit(engine, "first", Count(4))
    engine.pace.release()
    assert soon(lambda: len(engine.batches) == 1)
    second = submit(engine, "second", Count(2))
    engine.free_run()
    assert first.done.result(WAIT_S)[0] == 4
    assert second.done.result(WAIT_S)[0] == 2
    assert engine.batches[0] == ["first"]
    assert ["first", "second"] in engine.batches


def test_progress_is_reported_step_by_step(engine: CountingEngine) -> None:
    events: list[ProgressEvent] = []
    job = engine.submit(Count(3), "r", events.append)
    engine.free_run()
    job.done.result(WAIT_S)
    assert events == [ProgressEvent("dit", step, 3) for step in (1, 2, 3)]


def test_a_failed_step_fails_the_jobs_in_it_and_no_other() -> None:
    engine = CountingEngine(capacity=2)
    broken, partner = submit(engine, "broken", Count(5, fails_at=2)), submit(engine, "partner", Count(5))
    later = submit(engine, "later", Count(3))
    engine.free_run()
    for job in (broken, partner):
        error = error_of(job)
        assert isinstance(error, Internal)
        assert error.message == "RuntimeError: a number is missing"
    assert later.done.result(WAIT_S)[0] == 3
    assert sorted(engine.freed) == ["broken", "partner"]
    assert submit(engine, "after", Count(1)).done.result(WAIT_S)[0] == 1
    engine.close()


@pytest.mark.parametrize(
    ("cause", "expected"),
    [
        (InvalidRequest("too long", "prompt"), InvalidRequest("too long", "prompt")),
        (RuntimeError("no memory"), Internal("RuntimeError: no memory")),
    ],
)
def test_a_failed_admission_fails_that_job_alone(
    engine: CountingEngine, cause: Exception, expected: BagelError
) -> None:
    before, broken = submit(engine, "before", Count(3)), submit(engine, "broken", Count(3, admission=cause))
    after = submit(engine, "after", Count(3))
    engine.free_run()
    error = error_of(broken)
    assert (type(error), error.message, error.param) == (type(expected), expected.message, expected.param)
    assert before.done.result(WAIT_S)[0] == after.done.result(WAIT_S)[0] == 3
    assert engine.freed == []


def test_aborting_frees_what_is_active_and_what_waits() -> None:
    engine = CountingEngine(capacity=2)
    # One more step is under way when the cancellations come.
    jobs = {name: submit(engine, name, Count(4)) for name in ("leaver", "stayer", "waiting", "next")}
    engine.pace.release()
    assert soon(lambda: len(engine.batches) == 1)
    engine.abort("leaver")
    engine.abort("waiting")
    engine.free_run()
    for name in ("leaver", "waiting"):
        error = error_of(jobs[name])
        assert isinstance(error, Cancelled)
        assert name in error.message
    for name in ("stayer", "next"):
        assert jobs[name].done.result(WAIT_S)[0] == 4
    assert engine.freed == ["leaver"]
    assert all("waiting" not in batch for batch in engine.batches)
    engine.close()


def test_aborting_a_finished_request_revokes_its_leases(engine: CountingEngine) -> None:
    engine.free_run()
    job = submit(engine, "r", Count(1))
    assert job.done.result(WAIT_S)[0] == 1
    engine.abort("r")
    assert soon(lambda: engine.revoked == ["r"])


def test_closing_fails_the_rest_and_refuses_more() -> None:
    engine = CountingEngine(capacity=1)
    active, waiting = submit(engine, "active", Count(10**9)), submit(engine, "waiting", Count(1))
    engine.free_run()
    assert soon(lambda: len(engine.batches) > 1)
    engine.close()
    for job in (active, waiting, submit(engine, "late", Count(1))):
        error = error_of(job)
        assert isinstance(error, StageUnavailable)
        assert error.message == "dit is shutting down"
    assert engine.freed == ["active"]


def cuda_says(monkeypatch: pytest.MonkeyPatch, error: Exception | None) -> None:
    """A device that answers ``error`` once the engine's thread has its stream."""
    streams: list[object] = []

    def synchronize(device: torch.device) -> None:
        if error is not None and streams:
            raise error

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(torch.cuda, "Stream", lambda *_, **options: streams.append(options))
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)


def test_a_lost_device_ends_the_loop_and_fails_every_waiting_job(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda_says(monkeypatch, RuntimeError("CUDA error: an illegal memory access was encountered"))
    engine = CountingEngine(capacity=1, device=torch.device("cuda", 0))
    jobs = [submit(engine, "active", Count(5, fails_at=2)), submit(engine, "waiting", Count(1))]
    engine.free_run()
    for error in map(error_of, jobs):
        assert isinstance(error, StageUnavailable)
        assert error.message == "dit lost its device, or one of its ranks, and starts again"
    assert engine.lost.is_set()
    assert isinstance(error_of(submit(engine, "later", Count(1))), StageUnavailable)
    engine.close()
    assert engine.freed == []  # what was on the device went with it


def test_a_device_that_gives_no_stream_fails_what_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda_says(monkeypatch, None)
    monkeypatch.setattr(torch.cuda, "Stream", Mock(side_effect=RuntimeError("CUDA error: out of memory")))
    engine = CountingEngine(device=torch.device("cuda", 0))
    assert isinstance(error_of(submit(engine, "asked", Count(1))), StageUnavailable)
    assert engine.lost.is_set()
    engine.close()


def test_an_error_that_left_the_device_well_is_one_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda_says(monkeypatch, None)
    engine = CountingEngine(device=torch.device("cuda", 0))
    engine.free_run()
    assert error_of(submit(engine, "broken", Count(5, fails_at=2))).message == "RuntimeError: a number is missing"
    assert submit(engine, "later", Count(1)).done.result(WAIT_S)[0] == 1
    assert not engine.lost.is_set()
    engine.close()


# --- waiting ---


def test_jobs_beyond_the_room_wait_in_line() -> None:
    engine = CountingEngine(capacity=2)
    jobs = [submit(engine, str(number), Count(2)) for number in range(5)]
    engine.free_run()
    for job in jobs:
        job.done.result(WAIT_S)
    assert max(len(batch) for batch in engine.batches) == 2
    firsts = [name for batch in engine.batches for name in batch]
    assert list(dict.fromkeys(firsts)) == ["0", "1", "2", "3", "4"]
    engine.close()


def test_a_free_place_is_taken_without_polling_for_it() -> None:
    engine = CountingEngine(capacity=1)
    engine.poll_s = 2 * WAIT_S
    engine.free_run()
    jobs = [submit(engine, str(number), Count(1)) for number in range(100)]
    for job in jobs:
        job.done.result(WAIT_S)
    engine.close()


def test_waiting_and_working_are_timed_apart() -> None:
    start = time.monotonic()
    engine = CountingEngine(capacity=1)
    first, second = submit(engine, "first", Count(1)), submit(engine, "second", Count(1))
    time.sleep(0.1)
    engine.pace.release()
    _, first_stats = first.done.result(WAIT_S)
    time.sleep(0.1)
    engine.pace.release()
    _, second_stats = second.done.result(WAIT_S)
    elapsed = time.monotonic() - start
    assert first_stats.run_s > 0
    assert first_stats.queue_s + first_stats.run_s >= 0.09
    assert second_stats.queue_s >= 0.09
    assert second_stats.run_s > 0
    assert second_stats.queue_s + second_stats.run_s <= elapsed
    assert first_stats.stage == "dit"
    engine.close()


def test_a_waiting_job_whose_lease_is_gone_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def keep(job: CountJob) -> None:
        if job.request_id == "stale":
            raise LeaseError("the pool is gone")

    engine = CountingEngine(capacity=1)
    monkeypatch.setattr(engine, "_renew_leases", keep)
    active, stale, waiting = (submit(engine, name, Count(3)) for name in ("active", "stale", "waiting"))
    for _ in range(2):  # two steps, with time between them for a look at those who wait
        time.sleep(2 * LEASE_RENEWAL_S)
        engine.pace.release()
    assert isinstance(error_of(stale), LeaseError)
    engine.free_run()
    assert [job.done.result(WAIT_S)[0] for job in (active, waiting)] == [3, 3]
    engine.close()


def test_those_that_wait_are_taken_by_priority_then_by_age() -> None:
    engine = CountingEngine(capacity=1)
    first = submit(engine, "first", Count(1))
    assert soon(lambda: bool(engine._active()))
    order = [("late", 5), ("early", -1), ("a", 0), ("b", 0)]
    jobs = [engine.submit(Count(1), name, lambda event: None, SchedulingParams(priority)) for name, priority in order]
    engine.free_run()
    for job in (first, *jobs):
        job.done.result(WAIT_S)
    assert engine.batches == [["first"], ["early"], ["a"], ["b"], ["late"]]
    engine.close()


@pytest.mark.parametrize("waits", [True, False], ids=["waiting", "active"])
def test_a_job_ends_at_its_deadline_and_its_neighbour_goes_on(waits: bool) -> None:
    engine = CountingEngine(capacity=1 if waits else 2)
    neighbour = submit(engine, "neighbour", Count(3))
    late = engine.submit(Count(3), "late", lambda event: None, SchedulingParams(deadline=time.time() + 0.05))
    assert soon(lambda: time.time() > late.scheduling.deadline)
    engine.free_run()
    error = error_of(late)
    assert isinstance(error, DeadlineExceeded)
    assert error.param == "timeout"
    assert neighbour.done.result(WAIT_S)[0] == 3
    assert engine.freed == ([] if waits else ["late"])
    assert engine.revoked == ["late"]
    engine.close()


def test_a_full_queue_refuses_at_once_and_loses_no_job() -> None:
    engine = CountingEngine(capacity=1, max_waiting=3)
    jobs = [submit(engine, "0", Count(1))]
    assert soon(lambda: bool(engine._active()))
    jobs += [submit(engine, str(number), Count(1)) for number in range(1, 6)]
    for refused in jobs[4:]:
        assert isinstance(error_of(refused), Overloaded)
    engine.free_run()
    assert [job.done.result(WAIT_S)[0] for job in jobs[:4]] == [1] * 4
    assert submit(engine, "later", Count(1)).done.result(WAIT_S)[0] == 1
    engine.close()


# --- calls ---


def test_a_function_runs_on_the_engines_thread_and_its_result_comes_back() -> None:
    engine = CountingEngine()
    assert engine.call(lambda: threading.current_thread().name).result(WAIT_S) == "dit-engine"
    engine.close()


def test_its_exception_comes_back_and_harms_no_job() -> None:
    engine = CountingEngine()
    engine.free_run()

    def fail() -> None:
        raise LeaseError("wrong numbers")

    failing = engine.call(fail)
    job = engine.submit(Count(3), "r", lambda event: None)
    with pytest.raises(LeaseError, match="wrong numbers"):
        failing.result(WAIT_S)
    assert job.done.result(WAIT_S)[0] == 3
    engine.close()


def test_an_engine_that_is_closed_says_so() -> None:
    engine = CountingEngine()
    engine.close()
    with pytest.raises(StageUnavailable, match="dit is shutting down"):
        engine.call(lambda: None).result(WAIT_S)
