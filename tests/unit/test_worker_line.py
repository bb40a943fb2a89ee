"""Those who wait for a worker: their order, their time, and how many they may be."""

from __future__ import annotations

import time

import pytest

from bagel_triton.engine.loop import KEEP_S
from bagel_triton.protocol.errors import DeadlineExceeded, LeaseError, Overloaded
from bagel_triton.protocol.messages import SchedulingParams
from tests.support.counting_worker import WAIT_S, Count, CountingWorker, CountJob, error_of, submit
from tests.support.waiting import soon


def test_jobs_beyond_the_room_wait_in_line() -> None:
    worker = CountingWorker(capacity=2)
    jobs = [submit(worker, str(number), Count(2)) for number in range(5)]
    worker.free_run()
    for job in jobs:
        job.done.result(WAIT_S)
    assert max(len(batch) for batch in worker.batches) == 2
    firsts = [name for batch in worker.batches for name in batch]
    assert list(dict.fromkeys(firsts)) == ["0", "1", "2", "3", "4"]
    worker.close()


def test_a_free_place_is_taken_without_polling_for_it() -> None:
    worker = CountingWorker(capacity=1)
    worker.poll_s = 2 * WAIT_S
    worker.free_run()
    jobs = [submit(worker, str(number), Count(1)) for number in range(100)]
    for job in jobs:
        job.done.result(WAIT_S)
    worker.close()


def test_waiting_and_working_are_timed_apart() -> None:
    start = time.monotonic()
    worker = CountingWorker(capacity=1)
    first, second = submit(worker, "first", Count(1)), submit(worker, "second", Count(1))
    time.sleep(0.1)
    worker.pace.release()
    _, first_stats = first.done.result(WAIT_S)
    time.sleep(0.1)
    worker.pace.release()
    _, second_stats = second.done.result(WAIT_S)
    elapsed = time.monotonic() - start
    assert first_stats.queue_s < first_stats.run_s
    assert first_stats.run_s >= 0.09
    assert second_stats.queue_s >= 0.09
    assert second_stats.run_s > 0
    assert second_stats.queue_s + second_stats.run_s <= elapsed
    assert first_stats.stage == "dit"
    worker.close()


def test_a_waiting_job_whose_lease_is_gone_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def keep(job: CountJob) -> None:
        if job.request_id == "stale":
            raise LeaseError("the pool is gone")

    worker = CountingWorker(capacity=1)
    monkeypatch.setattr(worker, "_renew_leases", keep)
    active, stale, waiting = (submit(worker, name, Count(3)) for name in ("active", "stale", "waiting"))
    for _ in range(2):  # two steps, with time between them for a look at those who wait
        time.sleep(2 * KEEP_S)
        worker.pace.release()
    assert isinstance(error_of(stale), LeaseError)
    worker.free_run()
    assert [job.done.result(WAIT_S)[0] for job in (active, waiting)] == [3, 3]
    worker.close()


def test_those_that_wait_are_taken_by_priority_then_by_age() -> None:
    worker = CountingWorker(capacity=1)
    first = submit(worker, "first", Count(1))
    assert soon(lambda: bool(worker._active()))
    order = [("late", 5), ("early", -1), ("a", 0), ("b", 0)]
    jobs = [worker.submit(Count(1), name, lambda event: None, SchedulingParams(priority)) for name, priority in order]
    worker.free_run()
    for job in (first, *jobs):
        job.done.result(WAIT_S)
    assert worker.batches == [["first"], ["early"], ["a"], ["b"], ["late"]]
    worker.close()


@pytest.mark.parametrize("waits", [True, False], ids=["waiting", "active"])
def test_a_job_ends_at_its_deadline_and_its_neighbour_goes_on(waits: bool) -> None:
    worker = CountingWorker(capacity=1 if waits else 2)
    neighbour = submit(worker, "neighbour", Count(3))
    late = worker.submit(Count(3), "late", lambda event: None, SchedulingParams(deadline=time.time() + 0.05))
    assert soon(lambda: time.time() > late.schedule.deadline)
    worker.free_run()
    error = error_of(late)
    assert isinstance(error, DeadlineExceeded)
    assert error.param == "timeout"
    assert neighbour.done.result(WAIT_S)[0] == 3
    assert worker.dropped == ([] if waits else ["late"])
    assert worker.forgotten == ["late"]
    worker.close()


def test_a_line_that_is_full_refuses_at_once_and_loses_nobody() -> None:
    worker = CountingWorker(capacity=1, max_waiting=3)
    jobs = [submit(worker, "0", Count(1))]
    assert soon(lambda: bool(worker._active()))
    jobs += [submit(worker, str(number), Count(1)) for number in range(1, 6)]
    for refused in jobs[4:]:
        assert isinstance(error_of(refused), Overloaded)
    worker.free_run()
    assert [job.done.result(WAIT_S)[0] for job in jobs[:4]] == [1] * 4
    assert submit(worker, "later", Count(1)).done.result(WAIT_S)[0] == 1
    worker.close()
