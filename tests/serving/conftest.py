"""One server for all tests that only ask it things."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.serving import Server


@pytest.fixture(scope="session", autouse=True)
def no_gpu() -> Iterator[None]:
    """What is recorded was computed on a CPU; a server that is not told takes a GPU where it sees one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        yield


@pytest.fixture(scope="session")
def server(checkpoint_dir: Path) -> Iterator[Server]:
    """A server of the recorded cases' checkpoint; afterwards no lease is left."""
    with Server(checkpoint_dir) as running:
        yield running
        assert running.gauge("bagel_thinker_kv_leases") == 0
        assert running.gauge("bagel_thinker_kv_blocks_used") == 0
