"""The hand-off's measurement runs, measures what it says, and leaves nothing behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import kv_handoff


@pytest.mark.parametrize("connector", ["local", "shm"])
def test_a_row_of_each_kind_of_blocks(connector: str, capsys: pytest.CaptureFixture[str]) -> None:
    kv_handoff.main(["--connectors", connector, "--megabytes", "1", "--trials", "1", "--json"])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["connector"], row["megabytes"], row["blocks"]) for row in rows] == [
        (connector, 1, "consecutive"),
        (connector, 1, "scattered"),
    ]
    assert all(row["handoff_ms"] > 0 and row["copy_ms"] > 0 and row["first_ms"] > 0 for row in rows)
    assert not list(Path("/dev/shm").glob("bagel_triton_bench_*"))


@pytest.mark.parametrize(("handoff_ms", "status", "shown"), [(12.9, 0, ""), (13.1, 1, "  over the goal")])
def test_missing_the_goal_shows(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    handoff_ms: float,
    status: int,
    shown: str,
) -> None:
    def measured(
        connector: kv_handoff.Connector, megabytes: int, blocks: kv_handoff.BlockAllocator, *rest: object
    ) -> object:
        return kv_handoff.Handoff(connector, blocks, megabytes, handoff_ms, 10.0, 20.0)

    monkeypatch.setattr(kv_handoff, "measure", measured)
    assert kv_handoff.main(["--connectors", "shm", "--megabytes", "64"]) == status
    assert capsys.readouterr().out.splitlines()[1].endswith(f"20.00{shown}")


def test_a_connector_that_is_not_there_is_said_to_be(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(*arguments: object) -> object:
        raise kv_handoff.ConnectorUnavailable("it needs a library")

    monkeypatch.setattr(kv_handoff, "measure", missing)
    assert kv_handoff.main(["--connectors", "mooncake"]) == 0
    assert "mooncake: not measured: it needs a library" in capsys.readouterr().out
