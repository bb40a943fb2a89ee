"""A thread that has nothing to compute keeps no team of threads from those that have."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bagel_triton.model.cpu.thread_pool import release_team
from bagel_triton.pipeline.local import LocalStages
from bagel_triton.protocol.request import GenerationRequest
from tests.support.runs import generate
from tests.support.waiting import on_a_thread, soon


def threads() -> int:
    """Threads of this process, OpenMP's included."""
    return len(list(Path("/proc/self/task").iterdir()))


@pytest.mark.skipif(torch.get_num_threads() < 2, reason="one thread is a team of its own")
def test_a_released_team_is_gone_and_the_next_computes_the_same():
    def work() -> int:
        a = torch.randn(700, 700, generator=torch.Generator().manual_seed(0))
        before = threads()
        first = a @ a
        with_team = threads()
        release_team()
        after = threads()
        assert torch.equal(a @ a, first)
        assert torch.get_num_threads() == with_team - before + 1
        release_team()
        return after - before

    assert on_a_thread(work) == 0


@pytest.mark.skipif(torch.get_num_threads() < 2, reason="one thread is a team of its own")
def test_idle_engines_have_no_team(local_stages: LocalStages):
    request = GenerationRequest(prompt="A red cube", height=256, width=256, num_inference_steps=3, seed=1)
    release_team()
    before = threads()
    generate(local_stages, request)
    release_team()
    assert soon(lambda: threads() == before)  # every engine has to notice that it is idle
