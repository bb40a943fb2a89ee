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
    """The last layer computes few rows, so there are two."""
    tiny_checkpoint.write(tmp_path / "large", replace(LARGE, layers=2))
    tiny_checkpoint.write(tmp_path / "tiny", TinyConfig())
    found = next(compare(tmp_path / "large", tmp_path / "tiny", "float32", quantization))
    assert found.taken.loaded == pytest.approx(found.loaded, rel=0.05)
    assert found.taken.serving == pytest.approx(found.total, rel=0.05)
