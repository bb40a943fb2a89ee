"""A thread pool does everything once, shares it, and gives the answer that one thread gives."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bagel_triton.model.cpu import thread_pool
from bagel_triton.model.cpu.row_stable import linear
from bagel_triton.model.cpu.thread_pool import SINGLE_THREAD, ThreadPool, release_intraop_threads
from bagel_triton.pipeline.local import LocalStages
from bagel_triton.protocol.request import GenerationRequest
from tests.support.exact import assert_same
from tests.support.leaks import NO_LEAKS, Leaks
from tests.support.runs import generate
from tests.support.waiting import on_a_thread, soon

needs_two_threads = pytest.mark.skipif(torch.get_num_threads() < 2, reason="there is one intra-op thread here")


@pytest.fixture(params=[1, 2, 3])
def pool(request: pytest.FixtureRequest) -> Iterator[ThreadPool]:
    pool = ThreadPool(request.param)
    yield pool
    pool.close()


@pytest.mark.parametrize("count", [0, 1, 2, 50])
def test_every_item_is_done_once(pool: ThreadPool, count: int):
    done: list[int] = []
    pool.parallel_for(done.append, range(count))
    assert sorted(done) == list(range(count))


def test_all_threads_work_at_the_same_time(pool: ThreadPool):
    meeting = threading.Barrier(pool.size)
    pool.parallel_for(lambda _: meeting.wait(30.0) and None, range(pool.size))


def test_a_pool_at_rest_holds_nothing_of_its_last_work(pool: ThreadPool):
    """A forward's buffers and the KV it read would stay until the next one, beside that one's."""
    held = torch.ones(8)
    left = weakref.ref(held)

    def task(item: int, held: torch.Tensor = held) -> None:
        held.sum()

    pool.parallel_for(task, range(8))
    del task, held
    assert left() is None


def test_the_first_error_is_raised_and_the_pool_goes_on(pool: ThreadPool):
    begun: list[int] = []

    def task(item: int) -> None:
        begun.append(item)
        if item == 2:
            raise ValueError("item 2")

    with pytest.raises(ValueError, match="item 2"):
        pool.parallel_for(task, range(10_000))
    assert len(begun) < 10_000
    done: list[int] = []
    pool.parallel_for(done.append, range(5))
    assert sorted(done) == list(range(5))


@pytest.mark.parametrize("inference", [True, False])
def test_every_thread_is_in_the_callers_inference_mode(pool: ThreadPool, inference: bool):
    found: list[bool] = []
    with torch.inference_mode(inference):
        pool.parallel_for(lambda _: found.append(torch.is_inference_mode_enabled()), range(20))
        found.append(pool.run_with_intraop_threads(torch.is_inference_mode_enabled))
    assert found == [inference] * 21


def test_the_pools_threads_have_one_intraop_thread_and_others_keep_theirs():
    usual = torch.get_num_threads()
    pool, found = ThreadPool(3), list[int]()
    meeting = threading.Barrier(3)

    def note(_: int) -> None:
        meeting.wait(30.0)
        torch.ones(1 << 20).add_(1)  # a thread's first large operation sets its number of threads
        found.append(torch.get_num_threads())

    def work() -> int:
        pool.use_caller_thread()
        pool.parallel_for(note, range(3))
        return torch.get_num_threads()

    assert on_a_thread(work) == 1
    assert found == [1, 1, 1]
    assert torch.get_num_threads() == usual
    assert on_a_thread(torch.get_num_threads) == usual
    assert pool.run_with_intraop_threads(torch.get_num_threads) == usual
    pool.close()


def test_intraop_threads_are_for_large_products(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(thread_pool, "MIN_INTRAOP_WEIGHTS", 100)
    pool, here = ThreadPool(2), threading.get_ident()
    assert [pool.prefers_intraop_threads(weights) for weights in (99, 100)] == [False, True]
    assert not SINGLE_THREAD.prefers_intraop_threads(100)
    assert pool.run_with_intraop_threads(threading.get_ident) != here
    assert SINGLE_THREAD.run_with_intraop_threads(threading.get_ident) == here
    with pytest.raises(ZeroDivisionError):
        pool.run_with_intraop_threads(lambda: 1 // 0)
    pool.close()


def test_a_closed_pool_has_no_threads():
    leaks = Leaks()
    pool = ThreadPool(4)
    pool.run_with_intraop_threads(lambda: None)
    assert len(leaks.threads()) == 4
    pool.close()
    assert leaks.found() == NO_LEAKS


@needs_two_threads
def test_a_product_does_not_depend_on_the_threads_that_compute_it():
    """Few rows use all intra-op threads, many are shared by threads with one each; both round alike."""
    pool = ThreadPool(2)
    for inner, outer in [(64, 96), (385, 96), (512, 128), (1408, 512), (3584, 256)]:
        generator = torch.Generator().manual_seed(inner)
        weight = torch.randn(outer, inner, generator=generator) / inner**0.5
        for rows in (1, 16, 65, 600):
            x = torch.randn(rows, inner, generator=generator)
            results = [pool.run_with_intraop_threads(lambda x=x, weight=weight: linear(x, weight))]
            pool.parallel_for(
                lambda _, x=x, weight=weight, results=results: results.append(linear(x, weight)), range(2)
            )
            for other in results[1:]:
                assert_same(results[0], other, (inner, outer, rows))
    pool.close()


def _threads() -> set[str]:
    """Threads of this process, OpenMP's included."""
    return {task.name for task in Path("/proc/self/task").iterdir()}


@needs_two_threads
def test_released_intraop_threads_end_and_the_next_ones_compute_the_same():
    def work() -> set[str]:
        a = torch.randn(700, 700, generator=torch.Generator().manual_seed(0))
        before = _threads()
        first = a @ a
        started = _threads() - before  # threads of earlier tests may end meanwhile
        release_intraop_threads()
        left = started & _threads()
        assert torch.equal(a @ a, first)
        assert torch.get_num_threads() == len(started) + 1
        release_intraop_threads()
        return left

    assert not on_a_thread(work)


@needs_two_threads
def test_idle_engines_hold_no_intraop_threads(local_stages: LocalStages):
    request = GenerationRequest(prompt="A red cube", height=256, width=256, num_inference_steps=3, seed=1)
    release_intraop_threads()
    before = _threads()
    generate(local_stages, request)
    release_intraop_threads()
    assert soon(lambda: _threads() <= before)  # every engine has to notice that it is idle
