"""tritonserver's log as `serve` reads it, the lines of a slow start, and the folders that Triton leaves."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from bagel_triton.serving import tritonserver
from bagel_triton.serving.tritonserver import Scratch, StartupProgress

LOADED = "I1120 22:41:25.578660 4642 model_lifecycle.cc:839] \"successfully loaded 'dit'\"\n"
FAILED = (
    "E1120 22:41:25.652700 4642 model_lifecycle.cc:642] \"failed to load 'thinker' version 1: Internal: "
    'ValueError: a \\"quoted\\" word\\nsecond line\\n\\nAt:\\n  /models/thinker/1/model.py(3): initialize\\n"\n'
)
ABSENT = (
    "E1120 22:41:28.672031 4706 model_repository_manager.cc:1415] "
    "\"failed to poll model 'dit': model not found in any model repository.\"\n"
)
REFUSED = "error: creating server: Invalid argument - load failed for model 'bagel'\nsecond line\n"
ABORTED = "terminate called after throwing an instance of 'boost::interprocess::lock_exception'\n  what():  boost\n"
LOADER = "stub: error while loading shared libraries: libx.so.1: cannot open shared object file\n"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            LOADED + FAILED + REFUSED,
            "failed to load 'thinker' version 1: Internal: ValueError: a \"quoted\" word second line",
        ),
        (ABSENT + REFUSED, "failed to poll model 'dit': model not found in any model repository."),
        (LOADED + REFUSED, "Invalid argument - load failed for model 'bagel'"),
        (LOADER, "stub: error while loading shared libraries: libx.so.1: cannot open shared object file"),
        (LOADED + ABORTED, "terminate called after throwing an instance of 'boost::interprocess::lock_exception'"),
        (LOADED, None),
    ],
)
def test_the_reason_of_a_failure(tmp_path: Path, text: str, reason: str | None):
    log = tmp_path / "log"
    log.write_text(text)
    assert tritonserver.failure(log) == reason


def test_loaded_models(tmp_path: Path):
    log = tmp_path / "log"
    log.write_text(LOADED + FAILED)
    assert tritonserver.loaded_models(log) == {"dit"}


def test_a_slow_start_reports_every_ten_seconds_what_is_missing_by_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(tritonserver.time, "monotonic", lambda: clock.now)
    progress = StartupProgress()
    for second in range(1, 24):
        clock.now = 100.0 + second
        progress.note("dit, bagel" if second < 15 else "bagel")
    assert capsys.readouterr().out.splitlines() == ["  waiting for dit, bagel (11 s)", "  waiting for bagel (22 s)"]


def test_the_python_backends_empty_folder_goes_with_its_server_and_no_other(tmp_path: Path) -> None:
    earlier, own, later, in_use = (tmp_path / f"python_env_{letter * 6}" for letter in "abcd")
    earlier.mkdir()
    scratch = Scratch(tmp_path)
    own.mkdir()
    in_use.mkdir()
    (in_use / "environment").touch()
    scratch.claim()
    later.mkdir()
    scratch.remove()
    assert sorted(tmp_path.iterdir()) == [earlier, later, in_use]
