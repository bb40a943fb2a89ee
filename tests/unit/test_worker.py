"""The loop all engines share: jobs join, leave, fail and are cancelled without disturbing each other."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from bagel_triton.protocol.errors import (
    BagelError,
    Cancelled,
    Internal,
    InvalidRequest,
    StageUnavailable,
)
from bagel_triton.protocol.events import ProgressEvent
from tests.support.counting_worker import WAIT_S, Count, CountingWorker, error_of, submit
from tests.support.waiting import soon


@pytest.fixture
def worker() -> Iterator[CountingWorker]:
    worker = CountingWorker()
    yield worker
    worker.free_run()
    worker.close()


def test_jobs_finish_in_the_order_of_their_length_not_of_their_coming(worker: CountingWorker) -> None:
    finished: list[str] = []
    jobs = []
    for name, steps in (("long", 9), ("short", 2), ("middle", 5)):
        job = submit(worker, name, Count(steps))
        job.done.add_done_callback(lambda _, name=name: finished.append(name))
        jobs.append(job)
    worker.free_run()
    assert [job.done.result(WAIT_S)[0] for job in jobs] == [9, 2, 5]
    assert finished == ["short", "middle", "long"]


def test_a_job_joins_between_the_steps_of_another(worker: CountingWorker) -> None:
    first = submit(worker, "first", Count(4))
    worker.pace.release()
    assert soon(lambda: len(worker.batches) == 1)
    second = submit(worker, "second", Count(2))
    worker.free_run()
    assert first.done.result(WAIT_S)[0] == 4
    assert second.done.result(WAIT_S)[0] == 2
    assert worker.batches[0] == ["first"]
    assert ["first", "second"] in worker.batches


def test_progress_is_reported_step_by_step(worker: CountingWorker) -> None:
    events: list[ProgressEvent] = []
    job = worker.submit(Count(3), "r", events.append)
    worker.free_run()
    job.done.result(WAIT_S)
    assert events == [ProgressEvent("dit", step, 3) for step in (1, 2, 3)]


def test_a_failed_step_fails_the_jobs_in_it_and_no_other() -> None:
    worker = CountingWorker(capacity=2)
    broken, partner = submit(worker, "broken", Count(5, fails_at=2)), submit(worker, "partner", Count(5))
    later = submit(worker, "later", Count(3))
    worker.free_run()
    for job in (broken, partner):
        error = error_of(job)
        assert isinstance(error, Internal)
        assert error.message == "RuntimeError: a number is missing"
    assert later.done.result(WAIT_S)[0] == 3
    assert sorted(worker.dropped) == ["broken", "partner"]
    assert submit(worker, "after", Count(1)).done.result(WAIT_S)[0] == 1
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
    before, broken = submit(worker, "before", Count(3)), submit(worker, "broken", Count(3, admission=cause))
    after = submit(worker, "after", Count(3))
    worker.free_run()
    error = error_of(broken)
    assert (type(error), error.message, error.param) == (type(expected), expected.message, expected.param)
    assert before.done.result(WAIT_S)[0] == after.done.result(WAIT_S)[0] == 3
    assert worker.dropped == []


def test_cancelling_frees_what_is_active_and_what_waits() -> None:
    worker = CountingWorker(capacity=2)
    # One more step is under way when the cancellations come.
    jobs = {name: submit(worker, name, Count(4)) for name in ("leaver", "stayer", "waiting", "next")}
    worker.pace.release()
    assert soon(lambda: len(worker.batches) == 1)
    worker.cancel("leaver")
    worker.cancel("waiting")
    worker.free_run()
    for name in ("leaver", "waiting"):
        error = error_of(jobs[name])
        assert isinstance(error, Cancelled)
        assert name in error.message
    for name in ("stayer", "next"):
        assert jobs[name].done.result(WAIT_S)[0] == 4
    assert worker.dropped == ["leaver"]
    assert all("waiting" not in batch for batch in worker.batches)
    worker.close()


def test_cancelling_a_finished_request_forgets_what_it_left(worker: CountingWorker) -> None:
    worker.free_run()
    job = submit(worker, "r", Count(1))
    assert job.done.result(WAIT_S)[0] == 1
    worker.cancel("r")
    assert soon(lambda: worker.forgotten == ["r"])


def test_closing_fails_the_rest_and_refuses_more() -> None:
    worker = CountingWorker(capacity=1)
    active, waiting = submit(worker, "active", Count(10**9)), submit(worker, "waiting", Count(1))
    worker.free_run()
    assert soon(lambda: len(worker.batches) > 1)
    worker.close()
    for job in (active, waiting, submit(worker, "late", Count(1))):
        error = error_of(job)
        assert isinstance(error, StageUnavailable)
        assert error.message == "dit is shutting down"
    assert worker.dropped == ["active"]


def cuda_says(monkeypatch: pytest.MonkeyPatch, error: Exception | None) -> None:
    def synchronize(device: torch.device) -> None:
        if error is not None:
            raise error

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)


def test_a_device_that_is_lost_ends_it_and_nobody_is_left_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda_says(monkeypatch, RuntimeError("CUDA error: an illegal memory access was encountered"))
    worker = CountingWorker(capacity=1, device=torch.device("cuda", 0))
    jobs = [submit(worker, "active", Count(5, fails_at=2)), submit(worker, "waiting", Count(1))]
    worker.free_run()
    for error in map(error_of, jobs):
        assert isinstance(error, StageUnavailable)
        assert error.message == "dit lost its device and starts again"
    assert worker.lost.is_set()
    assert isinstance(error_of(submit(worker, "later", Count(1))), StageUnavailable)
    worker.close()
    assert worker.dropped == []  # what was on the device went with it


def test_an_error_that_left_the_device_well_is_one_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda_says(monkeypatch, None)
    worker = CountingWorker(device=torch.device("cuda", 0))
    worker.free_run()
    assert error_of(submit(worker, "broken", Count(5, fails_at=2))).message == "RuntimeError: a number is missing"
    assert submit(worker, "later", Count(1)).done.result(WAIT_S)[0] == 1
    assert not worker.lost.is_set()
    worker.close()
