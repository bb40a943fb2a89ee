"""A step's kernels and waits on a GPU of shapes alone: the published size, no device, no memory."""

from __future__ import annotations

import pytest
import torch

from tests.rehearsal.budgets import BUDGETS, Budget, seconds
from tests.rehearsal.fake_gpu import DeviceMix, Promotion, Tally, fake_gpu
from tests.rehearsal.scenes import at_full_depth, image, step_of

GPU = torch.device("cuda:0")


@pytest.mark.parametrize(
    "budget",
    [pytest.param(one, id=one.name, marks=() if one.cheap else pytest.mark.long) for one in BUDGETS],
)
def test_a_step_keeps_its_budget(budget: Budget) -> None:
    tally = at_full_depth(budget.scene, form=budget.form)
    assert tally.launches <= budget.kernels, tally.kernels.most_common()
    assert tally.stops <= budget.waits, tally.waits
    assert tally.masks == 0  # flash refuses them
    assert seconds(tally, 4e12)[0] > 0


@pytest.mark.long
def test_layers_are_alike() -> None:
    """So a few of them tell what all take."""
    few, more = (at_full_depth(lambda stage: step_of(stage, image(128)), layers) for layers in (2, 4))
    assert few.kernels == more.kernels
    assert few.flops == more.flops


def test_a_fake_gpu_refuses_what_a_gpu_would_refuse_or_copy_in_silence() -> None:
    with fake_gpu() as gpu, torch.inference_mode():
        rows, cpu = torch.empty(4, 8, device=GPU), torch.zeros(4, 8)
        with pytest.raises(DeviceMix):
            rows + cpu
        with pytest.raises(Promotion):
            rows + torch.empty(4, 8, dtype=torch.bfloat16, device=GPU)
        gpu.tally = Tally()
        rows[torch.tensor([0, 1])]
        assert gpu.tally.stops == 1  # the index goes up by itself


def test_a_fake_gpu_counts_kernels_transfers_and_waits() -> None:
    with fake_gpu() as gpu, torch.inference_mode():
        rows = torch.empty(4, 8, dtype=torch.bfloat16, device=GPU)
        gpu.tally = Tally()
        (rows[:2].view(16) * 2.0).sum()
        assert dict(gpu.tally.kernels) == {"mul": 1, "sum": 1}
        assert gpu.tally.stops == 0
        pinned = torch.zeros(4, 8, dtype=torch.bfloat16, pin_memory=True)
        rows.copy_(pinned, non_blocking=True)
        assert (gpu.tally.uploads, gpu.tally.stops) == (1, 0)
        rows.copy_(torch.zeros(4, 8, dtype=torch.bfloat16), non_blocking=True)  # pageable: it waits
        assert (gpu.tally.uploads, gpu.tally.stops) == (2, 1)
        assert rows.argmax().item() == 0
        assert (gpu.tally.downloads, gpu.tally.stops) == (1, 2)
        gpu.tally = Tally()
        torch.mm(rows, rows.t())
        assert gpu.tally.flops == 2 * 4 * 8 * 4
