"""A crew does everything once, shares it, and gives the answer that one thread gives."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from bagel_triton.model.cpu import thread_pool as crew_module
from bagel_triton.model.cpu.linear import linear
from bagel_triton.model.cpu.thread_pool import SINGLE_THREAD, ThreadPool
from tests.support.exact import assert_same
from tests.support.waiting import on_a_thread


@pytest.fixture(params=[1, 2, 3])
def crew(request: pytest.FixtureRequest) -> Iterator[ThreadPool]:
    crew = ThreadPool(request.param)
    yield crew
    crew.close()


@pytest.mark.parametrize("count", [0, 1, 2, 50])
def test_every_item_is_done_once(crew: ThreadPool, count: int):
    done: list[int] = []
    crew.parallel_for(done.append, range(count))
    assert sorted(done) == list(range(count))


def test_all_of_a_crew_work_at_the_same_time(crew: ThreadPool):
    meeting = threading.Barrier(crew.size)
    crew.parallel_for(lambda _: meeting.wait(30.0) and None, range(crew.size))  # nobody would come alone


def test_the_first_error_is_raised_and_the_crew_goes_on(crew: ThreadPool):
    begun: list[int] = []

    def task(item: int) -> None:
        begun.append(item)
        if item == 2:
            raise ValueError("item 2")

    with pytest.raises(ValueError, match="item 2"):
        crew.parallel_for(task, range(10_000))
    assert len(begun) < 10_000
    done: list[int] = []
    crew.parallel_for(done.append, range(5))
    assert sorted(done) == list(range(5))


@pytest.mark.parametrize("inference", [True, False])
def test_everyone_is_in_the_callers_inference_mode(crew: ThreadPool, inference: bool):
    found: list[bool] = []
    with torch.inference_mode(inference):
        crew.parallel_for(lambda _: found.append(torch.is_inference_mode_enabled()), range(20))
        found.append(crew.together(torch.is_inference_mode_enabled))
    assert found == [inference] * 21


def test_who_leads_and_who_helps_compute_alone_and_others_do_not():
    usual = torch.get_num_threads()
    crew, found = ThreadPool(3), list[int]()
    meeting = threading.Barrier(3)

    def note(_: int) -> None:
        meeting.wait(30.0)
        torch.ones(1 << 20).add_(1)  # a thread's first operation of this size finds out how many it has
        found.append(torch.get_num_threads())

    def lead() -> int:
        crew.lead()
        crew.parallel_for(note, range(3))
        return torch.get_num_threads()

    assert on_a_thread(lead) == 1
    assert found == [1, 1, 1]
    assert torch.get_num_threads() == usual
    assert on_a_thread(torch.get_num_threads) == usual
    assert crew.together(torch.get_num_threads) == usual
    crew.close()


def test_a_team_is_for_what_is_worth_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(crew_module, "WORTH_A_TEAM", 100)
    crew, here = ThreadPool(2), threading.get_ident()
    assert [crew.has_team_for(numbers) for numbers in (99, 100)] == [False, True]
    assert not SINGLE_THREAD.has_team_for(100)
    assert crew.together(threading.get_ident) != here
    assert SINGLE_THREAD.together(threading.get_ident) == here
    with pytest.raises(ZeroDivisionError):
        crew.together(lambda: 1 // 0)
    crew.close()


def test_a_closed_crew_has_no_threads():
    def count() -> int:
        return sum(thread.name.startswith("crew") for thread in threading.enumerate())

    before = count()
    crew = ThreadPool(4)
    crew.together(lambda: None)
    assert count() == before + 4
    crew.close()
    assert count() == before


@pytest.mark.skipif(torch.get_num_threads() < 2, reason="needs two threads to differ from one")
def test_a_product_does_not_depend_on_the_threads_that_compute_it():
    """Few rows have a team, many are shared by threads without one; both are to round alike."""
    crew = ThreadPool(2)
    for inner, outer in [(64, 96), (385, 96), (512, 128), (1408, 512), (3584, 256)]:
        generator = torch.Generator().manual_seed(inner)
        weight = torch.randn(outer, inner, generator=generator) / inner**0.5
        for rows in (1, 16, 65, 600):
            x = torch.randn(rows, inner, generator=generator)
            results = [crew.together(lambda x=x, weight=weight: linear(x, weight))]
            crew.parallel_for(
                lambda _, x=x, weight=weight, results=results: results.append(linear(x, weight)), range(2)
            )
            for other in results[1:]:
                assert_same(results[0], other, (inner, outer, rows))
    crew.close()
