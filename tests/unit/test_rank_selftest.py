"""The self-test of ranks that start: each kind of exchange is timed, and one that gives wrong numbers is named."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from bagel_triton.parallel.launch import LOOPBACK
from bagel_triton.parallel.rank import join, selftest

CPU = torch.device("cpu")
FUNCTIONS = {"all_reduce": "all_reduce", "all_gather": "all_gather", "all_to_all": "all_to_all_single"}


@pytest.fixture
def joined() -> Iterator[None]:
    """A process group of this process alone."""
    join(dist.HashStore(), LOOPBACK, CPU, 0, 1, 30.0)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("joined")
def test_each_kind_of_exchange_is_timed() -> None:
    times = selftest(CPU)
    assert [*times] == [*FUNCTIONS, "send"]
    assert min(times.values()) >= 0


@pytest.mark.usefixtures("joined")
@pytest.mark.parametrize("name", FUNCTIONS)
def test_an_exchange_that_gives_wrong_numbers_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(result: Tensor | list[Tensor], *given: Tensor) -> None:
        for part in [result] if isinstance(result, Tensor) else result:
            part.fill_(7.0)

    monkeypatch.setattr(dist, FUNCTIONS[name], wrong)
    with pytest.raises(RuntimeError, match=rf"^the self-test of the ranks' {name} gave \[7.0"):
        selftest(CPU)
