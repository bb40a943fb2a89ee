"""The loop all engines share: jobs join, leave, fail and are cancelled without disturbing each other."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from bagel_triton.engine.worker import KEEP_S
from bagel_triton.errors import (
    BagelError,
    Cancelled,
    DeadlineExceeded,
    Internal,
    InvalidRequest,
    LeaseError,
    Overloaded,
    StageUnavailable,
)
from bagel_triton.events import ProgressEvent
from bagel_triton.messages import Schedule
from tests.support.counting_worker import Count, CountingWorker, CountJob
from tests.support.waiting import soon

WAIT_S = 10.0


@pytest.fixture
def worker() -> Iterator[CountingWorker]:
    worker = CountingWorker()
    yield worker
    worker.free_run()
    worker.close()


def _submit(worker: CountingWorker, request_id: str, count: Count) -> CountJob:
    return worker.submit(count, request_id, lambda event: None)


def _error(job: CountJob) -> BagelError:
    error = job.done.exception(WAIT_S)
    assert isinstance(error, BagelError)
    return error


def test_jobs_finish_in_the_order_of_their_length_not_of_their_coming(worker: CountingWorker) -> None:
    finished: list[str] = []
    jobs = []
    for name, steps in (("long", 9), ("short", 2), ("middle", 5)):
        job = _submit(worker, name, Count(steps))
        job.done.add_done_callback(lambda _, name=name: finished.append(name))
        jobs.append(job)
    worker.free_run()
    assert [job.done.result(WAIT_S)[0] for job in jobs] == [9, 2, 5]
    assert finished == ["short", "middle", "long"]


def test_a_job_joins_between_the_steps_of_another(worker: CountingWorker) -> None:
    first = _submit(worker, "first", Count(4))
    worker.pace.release()
    assert soon(lambda: len(worker.batches) == 1)
    second = _submit(worker, "second", Count(2))
    worker.free_run()
    assert first.done.result(WAIT_S)[0] == 4
    assert second.done.result(WAIT_S)[0] == 2
    assert worker.batches[0] == ["first"]
    assert ["first", "second"] in worker.batches


def test_jobs_beyond_the_room_wait_in_line() -> None:
    worker = CountingWorker(capacity=2)
    jobs = [_submit(worker, str(number), Count(2)) for number in range(5)]
    worker.free_run()
    for job in jobs:
        job.done.result(WAIT_S)
    assert max(len(batch) for batch in worker.batches) == 2
    firsts = [name for batch in worker.batches for name in batch]
    assert list(dict.fromkeys(firsts)) == ["0", "1", "2", "3", "4"]
    worker.close()


def test_a_free_place_is_taken_at_once() -> None:
    worker = CountingWorker(capacity=1)
    worker.free_run()
    start = time.monotonic()
    jobs = [_submit(worker, str(number), Count(1)) for number in range(100)]
    for job in jobs:
        job.done.result(WAIT_S)
    assert time.monotonic() - start < 1.5  # a polling interval for each would be two seconds
    worker.close()


def test_waiting_and_working_are_timed_apart() -> None:
    worker = CountingWorker(capacity=1)
    first, second = _submit(worker, "first", Count(1)), _submit(worker, "second", Count(1))
    time.sleep(0.1)
    worker.pace.release()
    _, first_stats = first.done.result(WAIT_S)
    time.sleep(0.1)
    worker.pace.release()
    _, second_stats = second.done.result(WAIT_S)
    assert first_stats.queue_s < 0.09 <= first_stats.run_s
    assert second_stats.queue_s >= 0.09
    assert 0.05 <= second_stats.run_s < second_stats.queue_s + 0.09
    assert first_stats.stage == "dit"
    worker.close()


def test_progress_is_reported_step_by_step(worker: CountingWorker) -> None:
    events: list[ProgressEvent] = []
    job = worker.submit(Count(3), "r", events.append)
    worker.free_run()
    job.done.result(WAIT_S)
    assert events == [ProgressEvent("dit", step, 3) for step in (1, 2, 3)]


def test_a_failed_step_fails_the_jobs_in_it_and_no_other() -> None:
    worker = CountingWorker(capacity=2)
    broken, partner = _submit(worker, "broken", Count(5, fails_at=2)), _submit(worker, "partner", Count(5))
    later = _submit(worker, "later", Count(3))
    worker.free_run()
    for job in (broken, partner):
        error = _error(job)
        assert isinstance(error, Internal)
        assert error.message == "RuntimeError: a number is missing"
    assert later.done.result(WAIT_S)[0] == 3
    assert sorted(worker.dropped) == ["broken", "partner"]
    assert _submit(worker, "after", Count(1)).done.result(WAIT_S)[0] == 1
    worker.close()


@pytest.mark.parametrize(
    ("cause", "expected"),
    [
        (InvalidRequest("too long", "prompt"), InvalidRequest("too long", "prompt")),
        (RuntimeError("no memory"), Internal("RuntimeError: no memory")),
    ],
)
def test_a_failed_admission_fails_that_job_alone(
    worker: CountingWorker, cause: Exception, expected: BagelError
) -> None:
    before, broken = _submit(worker, "before", Count(3)), _submit(worker, "broken", Count(3, admission=cause))
    after = _submit(worker, "after", Count(3))
    worker.free_run()
    error = _error(broken)
    assert (type(error), error.message, error.param) == (type(expected), expected.message, expected.param)
    assert before.done.result(WAIT_S)[0] == after.done.result(WAIT_S)[0] == 3
    assert worker.dropped == []


def test_cancelling_frees_what_is_active_and_what_waits() -> None:
    worker = CountingWorker(capacity=2)
    # One more step is under way when the cancellations come.
    jobs = {name: _submit(worker, name, Count(4)) for name in ("leaver", "stayer", "waiting", "next")}
    worker.pace.release()
    assert soon(lambda: len(worker.batches) == 1)
    worker.cancel("leaver")
    worker.cancel("waiting")
    worker.free_run()
    for name in ("leaver", "waiting"):
        error = _error(jobs[name])
        assert isinstance(error, Cancelled)
        assert name in error.message
    for name in ("stayer", "next"):
        assert jobs[name].done.result(WAIT_S)[0] == 4
    assert worker.dropped == ["leaver"]
    assert all("waiting" not in batch for batch in worker.batches)
    worker.close()


def test_cancelling_a_finished_request_forgets_what_it_left(worker: CountingWorker) -> None:
    worker.free_run()
    job = _submit(worker, "r", Count(1))
    assert job.done.result(WAIT_S)[0] == 1
    worker.cancel("r")
    assert soon(lambda: worker.forgotten == ["r"])


def test_closing_fails_the_rest_and_refuses_more() -> None:
    worker = CountingWorker(capacity=1)
    active, waiting = _submit(worker, "active", Count(10**9)), _submit(worker, "waiting", Count(1))
    worker.free_run()
    assert soon(lambda: len(worker.batches) > 1)
    worker.close()
    for job in (active, waiting, _submit(worker, "late", Count(1))):
        error = _error(job)
        assert isinstance(error, StageUnavailable)
        assert error.message == "dit is shutting down"
    assert worker.dropped == ["active"]


def test_a_waiting_job_whose_lease_is_gone_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def keep(job: CountJob) -> None:
        if job.request_id == "stale":
            raise LeaseError("the arena is gone")

    worker = CountingWorker(capacity=1)
    monkeypatch.setattr(worker, "_keep", keep)
    active, stale, waiting = (_submit(worker, name, Count(3)) for name in ("active", "stale", "waiting"))
    for _ in range(2):  # two steps, with time between them for a look at those who wait
        time.sleep(2 * KEEP_S)
        worker.pace.release()
    assert isinstance(_error(stale), LeaseError)
    worker.free_run()
    assert [job.done.result(WAIT_S)[0] for job in (active, waiting)] == [3, 3]
    worker.close()


# --- order, time and bounds ---


def test_those_that_wait_are_taken_by_priority_then_by_age() -> None:
    worker = CountingWorker(capacity=1)
    first = _submit(worker, "first", Count(1))
    assert soon(lambda: bool(worker._active()))
    order = [("late", 5), ("early", -1), ("a", 0), ("b", 0)]
    jobs = [worker.submit(Count(1), name, lambda event: None, Schedule(priority)) for name, priority in order]
    worker.free_run()
    for job in (first, *jobs):
        job.done.result(WAIT_S)
    assert worker.batches == [["first"], ["early"], ["a"], ["b"], ["late"]]
    worker.close()


@pytest.mark.parametrize("waits", [True, False], ids=["waiting", "active"])
def test_a_job_ends_at_its_deadline_and_its_neighbour_goes_on(waits: bool) -> None:
    worker = CountingWorker(capacity=1 if waits else 2)
    neighbour = _submit(worker, "neighbour", Count(3))
    late = worker.submit(Count(3), "late", lambda event: None, Schedule(deadline=time.time() + 0.05))
    assert soon(lambda: time.time() > late.schedule.deadline)
    worker.free_run()
    error = _error(late)
    assert isinstance(error, DeadlineExceeded)
    assert error.param == "timeout"
    assert neighbour.done.result(WAIT_S)[0] == 3
    assert worker.dropped == ([] if waits else ["late"])
    assert worker.forgotten == ["late"]
    worker.close()


def test_a_line_that_is_full_refuses_at_once_and_loses_nobody() -> None:
    worker = CountingWorker(capacity=1, max_waiting=3)
    jobs = [_submit(worker, "0", Count(1))]
    assert soon(lambda: bool(worker._active()))
    jobs += [_submit(worker, str(number), Count(1)) for number in range(1, 6)]
    for refused in jobs[4:]:
        assert isinstance(_error(refused), Overloaded)
    worker.free_run()
    assert [job.done.result(WAIT_S)[0] for job in jobs[:4]] == [1] * 4
    assert _submit(worker, "later", Count(1)).done.result(WAIT_S)[0] == 1
    worker.close()
