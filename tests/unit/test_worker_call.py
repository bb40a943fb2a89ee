"""Functions run on a worker's thread, between its steps."""

from __future__ import annotations

import threading

import pytest

from bagel_triton.protocol.errors import LeaseError, StageUnavailable
from tests.support.counting_worker import Count, CountingWorker

WAIT_S = 30.0


def test_a_function_runs_on_the_workers_thread_and_its_result_comes_back() -> None:
    worker = CountingWorker()
    assert worker.call(lambda: threading.current_thread().name).result(WAIT_S) == "dit-engine"
    worker.close()


def test_its_exception_comes_back_and_harms_nobody() -> None:
    worker = CountingWorker()
    worker.free_run()

    def fail() -> None:
        raise LeaseError("wrong numbers")

    failing = worker.call(fail)
    job = worker.submit(Count(3), "r", lambda event: None)
    with pytest.raises(LeaseError, match="wrong numbers"):
        failing.result(WAIT_S)
    assert job.done.result(WAIT_S)[0] == 3
    worker.close()


def test_a_worker_that_is_closed_says_so() -> None:
    worker = CountingWorker()
    worker.close()
    with pytest.raises(StageUnavailable, match="dit is shutting down"):
        worker.call(lambda: None).result(WAIT_S)
