"""The simulation of many GPUs, held to what queueing theory says of cases that it can solve."""

from __future__ import annotations

import statistics

import pytest

from bagel_triton.deploy.config import Policy
from bench.simulate import BENCHMARKS, SIDES, Clock, Kind, Outcome, Shared, calculated, kinds, main, simulate

ONE_KIND = [Kind(1.0, 0.0, 1.0, 1)]


def run(load: float, dits: int = 1, policy: Policy = "random", batch: int = 10**6, requests: int = 20_000) -> Outcome:
    return simulate(
        ONE_KIND, cells=1, dits=dits, batch=batch, load=load, outer="random", policy=policy, requests=requests
    )


def test_a_server_shares_its_time_and_makes_the_rest_wait() -> None:
    clock, ended = Clock(), list[float]()
    server = Shared(clock, 2)
    for seconds in (1.0, 2.0, 1.0):
        server.serve(seconds, ended.append)
    clock.run()
    assert ended == [2.0, 4.0, 4.0]  # two at half speed, then the third joins
    assert server.busy_s == 4.0


@pytest.mark.parametrize("load", [0.5, 0.8])
def test_the_mean_time_is_that_of_a_shared_processor(load: float) -> None:
    """Poisson arrivals at a shared processor: service time over 1 - load, whatever the sizes."""
    assert statistics.fmean(run(load, requests=60_000).seconds) == pytest.approx(1 / (1 - load), rel=0.1)


def test_random_choice_among_many_is_as_one_each() -> None:
    assert statistics.fmean(run(0.5, dits=8).seconds) == pytest.approx(2.0, rel=0.1)


def test_least_outstanding_work_beats_turns_and_chance() -> None:
    tails = {policy: run(0.8, dits=8, policy=policy, batch=8).percentile(99) for policy in ("random", "round-robin")}
    assert run(0.8, dits=8, policy="least-outstanding-tokens", batch=8).percentile(99) < min(tails.values())


def test_the_plans_times_are_those_of_the_benchmarks() -> None:
    """The page says what an image takes alone: it is rewritten with the table when the benchmarks change."""
    every = kinds({side: calculated(f"guided step, {side}") for side in SIDES}, 0.0, 0.0)
    small, large = (f"{kind.dit_s:.1f} s" for kind in every if kind.share)
    mean = statistics.fmean(kind.dit_s for kind in every if kind.share)
    page = (BENCHMARKS.parent / "scaling.md").read_text()
    assert f"its time alone, which is {small} or {large}" in page
    assert f"A DiT needs {mean:.1f} s for an average image" in page
    assert f"{960 / mean:.0f} images a second at most" in page


def test_one_command_prints_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--gpus", "8", "--cell", "4", "--load", "0.5", "--requests", "300"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("2 cells of 1 thinker and 3 DiTs; an image takes")
    assert len(lines) == 4 + 6
