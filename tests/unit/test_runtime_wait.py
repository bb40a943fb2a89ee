"""What a person hears of a start that takes its time."""

from types import SimpleNamespace

import pytest

from bagel_triton.serving import startup_progress as wait


def test_it_is_told_of_every_ten_seconds_with_what_is_missing_by_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(wait.time, "monotonic", lambda: clock.now)
    waiting = wait.StartupProgress()
    for second in range(1, 24):
        clock.now = 100.0 + second
        if waiting.due:
            waiting.tell("dit, bagel" if second < 15 else "bagel")
    assert capsys.readouterr().out.splitlines() == ["  waiting for dit, bagel (11 s)", "  waiting for bagel (22 s)"]
