"""The measurements' rows end up in one file, beside what others left there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bagel_triton.bench import kv_handoff, suite, weight_sharing
from bagel_triton.bench.process_memory import ProcessMemory
from bagel_triton.bench.weight_sharing import Sharing, StageCost

ROW = kv_handoff.Handoff("shm", "scattered", 64, 12.0, 10.0, 20.0)
MISSING = kv_handoff.Unavailable("mooncake", "it needs a library")


def test_what_is_measured_is_printed_and_kept(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    stages = tuple(StageCost(stage, 1.0, 0.1, ProcessMemory(300, 100)) for stage in ("thinker", "dit"))
    tiny = (StageCost("thinker", 0.1, 0.1, ProcessMemory(100, 50)),)
    monkeypatch.setattr(kv_handoff, "run", lambda: iter([ROW, MISSING]))
    monkeypatch.setattr(weight_sharing, "run", lambda: iter([("float32", Sharing(400, stages, tiny))]))
    path = tmp_path / "bench" / "results.json"
    suite.merge(path, {"other": [1], "kv_handoff": ["old"]})
    suite.main(["--output", str(path)])
    kept = json.loads(path.read_text())
    assert kept["other"] == [1]
    assert [row["connector"] for row in kept["kv_handoff"]] == ["shm", "mooncake"]
    assert kept["kv_handoff"][0]["handoff_ms"] == 12.0
    [sharing] = kept["weight_sharing"]
    assert (sharing["dtype"], sharing["copies"], sharing["stages"][1]["stage"]) == ("float32", 1.25, "dit")
    assert kept["machine"]["cores"] >= 1
    printed = capsys.readouterr().out
    assert "mooncake: not measured: it needs a library" in printed
    assert "in memory 1.250 times" in printed
