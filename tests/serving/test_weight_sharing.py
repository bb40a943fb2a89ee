"""The weights of a server's stages, measured in the processes that hold them."""

from __future__ import annotations

from pathlib import Path

import pytest

from bagel_triton.weights.tiny import checkpoint as tiny_checkpoint
from bagel_triton.weights.tiny.config import TinyConfig
from bench.weight_sharing import measure


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.long)])
def test_all_stages_together_hold_one_copy(tmp_path: Path, dtype: str) -> None:
    config = TinyConfig(hidden_size=512, layers=4, heads=8, kv_heads=2, intermediate_size=1536, vocab_size=2048)
    tiny_checkpoint.write(tmp_path / "checkpoint", config)
    sharing = measure(tmp_path / "checkpoint", dtype)
    assert sharing.weight_bytes > 50e6
    assert sharing.copies < 1.25
