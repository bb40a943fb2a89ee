"""One server for all tests that only ask it things."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.serving import Server


@pytest.fixture(scope="session")
def server(checkpoint_dir: Path) -> Iterator[Server]:
    """A server of the recorded cases' checkpoint; afterwards no lease is left."""
    with Server(checkpoint_dir) as running:
        yield running
        assert running.gauge("bagel_thinker_kv_leases") == 0
        assert running.gauge("bagel_thinker_kv_blocks_used") == 0
