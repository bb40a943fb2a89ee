"""A process takes the memory that the plan says, by the kernel's count."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from bagel_triton.deploy.config import Quantization
from bagel_triton.weights.tiny import checkpoint as tiny_checkpoint
from bagel_triton.weights.tiny.config import TinyConfig
from bench.memory_plan import LARGE, compare


@pytest.mark.long
@pytest.mark.parametrize("quantization", [None, "int8"])
def test_it_is_what_was_planned(tmp_path: Path, quantization: Quantization | None) -> None:
    """At most 5 % more; less where stages are not at their peaks at the same time."""
    tiny_checkpoint.write(tmp_path / "large", replace(LARGE, layers=1))
    tiny_checkpoint.write(tmp_path / "tiny", TinyConfig())
    found = compare(tmp_path / "large", tmp_path / "tiny", "float32", quantization)
    assert 0.85 * found.total < found.taken.serving < 1.05 * found.total
    assert (
        0.95 * found.weights < found.taken.loaded < 1.25 * found.weights
    )  # with what was freed while they were loaded
