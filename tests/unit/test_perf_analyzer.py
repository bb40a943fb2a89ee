"""perf_analyzer of the installed tritonclient starts."""

import subprocess

import pytest

from bagel_triton.serving import CommandError, cli, perf_analyzer


def test_it_runs_with_the_libraries_laid_out():
    with perf_analyzer.prepare() as analyzer:
        shown = subprocess.run(
            [analyzer.program, "--version"], env=analyzer.environment, capture_output=True, text=True, check=True
        )
    assert "Perf Analyzer Version" in shown.stdout + shown.stderr


def test_its_exit_status_is_the_commands(capfd: pytest.CaptureFixture[str]):
    assert cli.main(["perf-analyzer", "--", "--version"]) == 0
    assert cli.main(["perf-analyzer", "--", "--no-such-option"]) != 0


@pytest.mark.parametrize("arguments", [[], ["--"]])
def test_without_arguments_it_says_that_it_needs_some(capsys: pytest.CaptureFixture[str], arguments: list[str]):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["perf-analyzer", *arguments])
    error = capsys.readouterr().err
    assert exit_.value.code == 2
    assert error.startswith("bagel-triton: error: perf_analyzer needs arguments: -- -m MODEL")
    assert error.count("\n") == 1


def test_a_wheel_without_it_is_a_clear_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.metadata.files", lambda name: [])
    with pytest.raises(CommandError, match="tritonclient carries no perf_analyzer"), perf_analyzer.prepare():
        pytest.fail("there is nothing to run")
